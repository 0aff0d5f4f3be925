"""Run a program as a plain process of this user: limits and a deadline, no protection at all.

Only for `unsafe_local=True`, where no sandbox can be made and the user trusts the programs.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ...errors import SandboxError
from .enclosure import wire
from .limits import SandboxLimits
from .sandbox import SandboxResult, call_launcher, clean_environment, runner_source


def run_unprotected(
    program: str, files: Mapping[str, bytes], limits: SandboxLimits, environment: Mapping[str, str]
) -> SandboxResult:
    """As `Sandbox.run`, in a temporary folder; see `SandboxLimits` for what then is still bounded: each process's
    address space, files and processor time, the output and the wall time. Not memory in all, disk, or processes.

    Raises:
        SandboxError: this system cannot limit processes, or the program could not be started.
    """
    if os.name != "posix":
        raise SandboxError(f"programs cannot be limited on {sys.platform}; there is no unsafe_local either.")
    with tempfile.TemporaryDirectory(prefix="metis-home-program-") as place:
        folder, code = Path(place, "folder"), Path(place, "code")
        folder.mkdir()
        code.mkdir()
        for name, content in files.items():
            path = Path(os.path.normpath(folder / name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (code / "program.py").write_text(program, encoding="utf-8", errors="replace")
        (code / "runner.py").write_bytes(runner_source())
        packages = [path for path in sys.path if path.endswith("-packages")]
        request = wire.pack(
            {
                "limits": asdict(limits),
                "folder": str(folder),
                "argv": [
                    sys.executable,
                    "-I",
                    "-S",
                    "-B",
                    str(code / "runner.py"),
                    str(code / "program.py"),
                    *packages,
                ],
                "environment": {**clean_environment(), "HOME": str(folder), "TMPDIR": place, **environment},
            },
            [],
        )
        return call_launcher("unprotected", request, limits)
