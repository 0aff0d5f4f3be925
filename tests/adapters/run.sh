#!/usr/bin/env bash
# Test the adapters inside the real benchmark kits: tests/adapters/run.sh [PREFIX] [PYTHON]
# Makes PREFIX-lmms and PREFIX-vlmeval (0.7 GB each) once; everything that PYTHON's environment has stands behind them.
set -euo pipefail
cd "$(dirname "$0")/../.."
prefix=$(realpath -m "${1:-.venv-adapters}")
python=${2:-python3}
# Their dependencies contradict each other (latex2sympy2), so each kit has an environment of its own.
declare -A kits=([lmms]=lmms-eval==0.7.3 [vlmeval]=ms-vlmeval==0.0.20)
behind=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
for kit in lmms vlmeval; do
  venv=$prefix-$kit
  [ -e "$venv/.ready" ] && continue
  printf '== making %s\n' "$venv" >&2
  "$python" -m venv "$venv"
  own=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
  echo "import site; site.addsitedir('$behind')" > "$own/main_environment.pth"
  "$venv/bin/python" -m pip install -q --no-cache-dir -c environment/constraints.txt "${kits[$kit]}"
  # Its build for CUDA fails to import beside a CPU torch. lmms-eval works without; VLMEvalKit does not, see run_vlmeval.py.
  [ $kit = vlmeval ] || "$venv/bin/python" -m pip uninstall -q -y torchvision
  "$venv/bin/python" -m pip install -q --no-cache-dir --no-deps --no-build-isolation -e .
  touch "$venv/.ready"
done
LMMS_EVAL_TEST_PYTHON="$prefix-lmms/bin/python" VLMEVAL_TEST_PYTHON="$prefix-vlmeval/bin/python" \
  "$python" -m pytest tests/adapters
