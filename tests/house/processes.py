"""Run Python in a process of its own, with nothing inherited that could make an import work by accident."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_LEFT_OUT = {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "TRITON_INTERPRET"}


def run_python(
    *arguments: str | Path,
    cwd: Path,
    python: str | Path = sys.executable,
    path: tuple[Path, ...] = (),
) -> str:
    """Run `python arguments` in `cwd` with `path` as PYTHONPATH; return its output, fail with it if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\nstatus {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
