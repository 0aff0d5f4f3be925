#!/usr/bin/env bash
# Fuzz the header reader for a bounded time: tests/fuzz/run.sh [SECONDS] [PYTHON]
# The committed corpus is only read; what is found goes to a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${2:-python3}
"$python" -c 'import atheris' 2>/dev/null || { echo "error: atheris is not installed: $python -m pip install atheris" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHONPATH=".:${PYTHONPATH:-}" "$python" tests/fuzz/fuzz_header.py -max_total_time="${1:-60}" -max_len=4096 -dict=tests/fuzz/words.dict \
  -artifact_prefix="$work/" -print_final_stats=1 "$work" tests/fuzz/corpus/header
