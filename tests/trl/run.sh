#!/usr/bin/env bash
# Test the hand-over in a real TRL: tests/trl/run.sh [--environment-only] [VENV] [PYTHON]
# Makes TRL's environment once where VENV does not exist yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
only=
if [ "${1:-}" = --environment-only ]; then only=yes; shift; fi
venv=$(realpath -m "${1:-.venv-trl}")
python=${2:-python3}
[ -e "$venv/.complete" ] || { tests/trl/install_trl.sh "$venv" "$python" && touch "$venv/.complete"; }
[ -n "$only" ] || TRL_TEST_PYTHON="$venv/bin/python" "$python" -m pytest -m trl tests/trl
