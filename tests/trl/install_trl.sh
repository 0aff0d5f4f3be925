#!/usr/bin/env bash
# Makes an environment with TRL in front and the packages of PYTHON's environment behind it: install_trl.sh VENV [PYTHON]
set -euo pipefail
venv=$1
python=${2:-python3}
"$python" -m venv "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_paths()['purelib'])" \
  > "$site/main_environment.pth"
# without its dependencies: they are in the main environment, and a newer torch would be a CUDA build
"$venv/bin/python" -m pip install -q --no-deps trl==1.16.0
"$venv/bin/python" -c 'import trl, transformers; from trl import GRPOTrainer; print("trl", trl.__version__, "transformers", transformers.__version__)'
