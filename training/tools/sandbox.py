"""Run an untrusted Python program in an enclosure that the operating system keeps shut.

    this process --request--> launcher (python -I -S) --clone--> first process: makes the file system, watches, reports
                                                                    `-- the program: no rights, no network, few calls

Namespaces (user, mount, process, network, ipc, uts, cgroup) of Linux 5.14 and newer, a root file system of its own,
resource limits, no capabilities, no-new-privileges and a filter of system calls. Works as root and as any user who may
create user namespaces. docs/tools.md says what is bounded and what is not.
"""

import functools
import logging
import os
import platform
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from ...errors import SandboxError
from .enclosure import collect, wire
from .limits import SandboxLimits

logger = logging.getLogger(__name__)

Ended = Literal["finished", "failed", "killed", "time", "memory", "output"]

FOLDER = "/scratch"  # the working directory of every program
_TEMPORARY = "../tmp/"  # how names of files in the temporary folder begin
_PROGRAM, _RUNNER = "/program/program.py", "/program/runner.py"
_ENCLOSURE = Path(__file__).parent / "enclosure"
_BOOT = "import sys; sys.path.append({!r}); from enclosure import {}; {}.main()"
_START_SECONDS = 20.0  # for the launcher, beside the program's own time; a busy machine is slow
_MAX_PROGRAM_BYTES = 1 << 20
_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib", "/lib", "/lib64", "/lib32")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo", "/usr/share/fonts")
_SYSTEM_PREFIXES = ("/", "/usr", "/usr/local")


class FolderFullError(SandboxError):
    """The files that a program is to find do not fit into its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    """What one program did."""

    ended: Ended
    """finished: exit status 0. failed: another. killed: by a signal. time, memory, output: stopped at that limit."""
    exit_code: int | None
    signal: int | None
    stdout: str
    stderr: str
    changed: dict[str, bytes]
    """Regular files in the folder that are new or changed; name relative to it -> content."""
    kept: list[str]
    """All regular files that are there now, unchanged ones too."""
    left_out: list[str]
    """What was in the folder and does not come back, with the reason: links, pipes, too many or too large files."""
    left_behind: int
    """Processes that were still running when the program ended. They were killed."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Largest total of memory that was seen, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enclosed:
    """What programs in here may read, and the interpreter that runs them; built once by `describe_interpreter`."""

    python: str
    packages: tuple[str, ...]
    readable: tuple[str, ...]
    links: tuple[tuple[str, str], ...]


class Sandbox:
    """Runs programs, each in an enclosure of its own.

    Args:
        limits: bounds of each run.
        unsafe_local: run programs as plain processes of this user where no enclosure can be made. They can then read
            what the user can read, reach the network and write everywhere: only for programs you trust.
        readable: more files or folders that programs may read, at their own paths.
    Raises:
        SandboxError: no enclosure can be made here (the message says why) and `unsafe_local` is False.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        unsafe_local: bool = False,
        readable: Sequence[str | Path] = (),
    ) -> None:
        self.limits = limits or SandboxLimits()
        usable, reason = sandbox_available()
        if not usable and not unsafe_local:
            raise SandboxError(
                f"untrusted code cannot be run safely here: {reason} If you trust the programs, run them without "
                "protection: unsafe_local=True, on the command line --unsafe-local."
            )
        self.is_enclosed = usable
        if usable:
            self._interpreter = describe_interpreter(tuple(str(Path(path).resolve()) for path in readable))
        else:
            logger.warning(
                "UNSAFE: programs written by a model run without a sandbox, with all rights of this user, because "
                "unsafe_local is set and no sandbox is usable (%s)",
                reason,
            )

    def run(
        self,
        program: str,
        files: Mapping[str, bytes] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> SandboxResult:
        """Run one Python program and wait for it, at most `limits.wall_seconds` and the time to start.

        Args:
            program: source text, run as `__main__` in the folder `/scratch`; a last expression is printed.
            files: content of the folder before it starts, by relative name; names that begin with "../tmp/" are
                placed in the temporary folder instead, where they have room of their own, and do not come back.
            environment: variables beside the few that are always set; nothing is inherited.
        Raises:
            FolderFullError: the files do not fit into the folder.
            SandboxError: the program is too large, or the enclosure failed.
        """
        encoded = program.encode("utf-8", "replace")
        if len(encoded) > _MAX_PROGRAM_BYTES:
            raise SandboxError(f"the program has {len(encoded)} bytes. At most {_MAX_PROGRAM_BYTES} are run.")
        files = dict(files or {})
        _refuse_too_much(files, self.limits)
        if not self.is_enclosed:
            from .unsafe_local import run_unprotected

            return run_unprotected(program, files, self.limits, dict(environment or {}))
        return _run_enclosed(encoded, files, self.limits, self._interpreter, environment or {})


def _refuse_too_much(files: Mapping[str, bytes], limits: SandboxLimits) -> None:
    inside = {name: len(content) for name, content in files.items() if not name.startswith(_TEMPORARY)}
    room = collect.Room(max_files=limits.scratch_files, max_bytes=limits.scratch_bytes)
    for name, size in inside.items():
        problem = room.refuse(name, size)
        if problem is not None:
            raise FolderFullError(
                f"the folder {FOLDER} is full: it holds {len(inside)} files of {sum(inside.values())} bytes, {problem}. "
                "Raise the limit or leave some out."
            )


def sandbox_available() -> tuple[bool, str]:
    """Can programs be enclosed here, and if not, why not; tried for real once per process."""
    if sys.platform != "linux":
        return False, f"the sandbox is made of Linux namespaces, and this is {platform.system()}."
    from .enclosure import kernel

    if kernel.MACHINE not in kernel.ARCHITECTURES:
        known = ", ".join(kernel.ARCHITECTURES)
        return False, f"there is no table of system calls for {kernel.MACHINE}; there is one for {known}."
    from .probe import probe

    return probe()


def describe_interpreter(readable: tuple[str, ...] = ()) -> Enclosed:
    """This interpreter, its standard library and packages, and the system's libraries: what programs may read.

    Raises:
        SandboxError: one of these folders is the home directory or holds it.
    """
    python = os.path.realpath(sys.executable)
    packages = tuple(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
    if site.ENABLE_USER_SITE and os.path.isdir(site.getusersitepackages()):
        packages += (site.getusersitepackages(),)
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *packages, *readable]
    folders += [p for p in (sys.base_prefix, sys.base_exec_prefix) if p not in _SYSTEM_PREFIXES]
    home = os.path.realpath(os.path.expanduser("~"))
    for folder in folders:
        if os.path.commonpath([os.path.realpath(folder), home]) == os.path.realpath(folder):
            raise SandboxError(
                f"{folder} would be readable inside the sandbox, and the home directory {home} is in it. Use a virtual "
                "environment in a folder of its own."
            )
    links, trees = [], []
    for path in dict.fromkeys([*_SYSTEM_LIBRARIES, *_SYSTEM_FILES, *folders, python]):
        if os.path.islink(path) and path in _SYSTEM_LIBRARIES:
            links.append((path, os.readlink(path)))
        elif os.path.exists(path):
            trees.append(path)
    trees = [path for path in trees if not any(_is_below(path, other) for other in trees)]
    return Enclosed(python=python, packages=packages, readable=tuple(trees), links=tuple(links))


def _is_below(path: str, folder: str) -> bool:
    return path != folder and path.startswith(folder.rstrip("/") + "/")


def _run_enclosed(
    program: bytes,
    files: Mapping[str, bytes],
    limits: SandboxLimits,
    interpreter: Enclosed,
    environment: Mapping[str, str],
) -> SandboxResult:
    header = {
        "limits": asdict(limits),
        "readable": interpreter.readable,
        "links": interpreter.links,
        "argv": [interpreter.python, "-I", "-S", "-B", _RUNNER, _PROGRAM, *interpreter.packages],
        "environment": {**clean_environment(), **environment},
    }
    content = [(os.path.normpath(f"{FOLDER}/{name}"), data) for name, data in files.items()]
    request = wire.pack(header, [*content, (_PROGRAM, program), (_RUNNER, runner_source())])
    return call_launcher("launch", request, limits)


def call_launcher(module: str, request: bytes, limits: SandboxLimits) -> SandboxResult:
    """Ask a launcher (a module of the enclosure); should it not answer in time, killing it takes everything along.

    Raises:
        SandboxError: it cannot be started, does not answer, or reports that it failed.
    """
    boot = _BOOT.format(str(_ENCLOSURE.parent), module, module)
    seconds = limits.wall_seconds + _START_SECONDS
    try:
        reply = subprocess.run(
            [os.path.realpath(sys.executable), "-I", "-S", "-c", boot],
            input=request,
            capture_output=True,
            timeout=seconds,
            env={"LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"the sandbox did not answer within {seconds:.0f} s and was killed.") from error
    except OSError as error:
        raise SandboxError(f"the sandbox could not be started: {error}.") from error
    try:
        report, received = wire.unpack(reply.stdout)
    except ValueError as error:
        talk = reply.stderr.decode(errors="replace").strip()[-500:]
        raise SandboxError(
            f"the sandbox ended without a report ({error}; status {reply.returncode}). {talk}"
        ) from error
    if "error" in report:
        raise SandboxError(f"the sandbox could not be made: {report['error']}.")
    return _result(report, received)


def _result(report: Mapping[str, object], received: wire.Files) -> SandboxResult:
    """The launcher's report in our words."""
    (_, stdout), (_, stderr), *changed = received
    exit_code, number = cast(int | None, report["exit_code"]), cast(int | None, report["signal"])
    ended = cast(Ended, report["stopped"] or ("killed" if number else "failed" if exit_code else "finished"))
    if ended == "killed" and report.get("cpu_limit"):
        ended = "time"
    return SandboxResult(
        ended=ended,
        exit_code=exit_code,
        signal=number,
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        changed=dict(changed),
        kept=cast(list[str], report["kept"]),
        left_out=cast(list[str], report["left_out"]),
        left_behind=cast(int, report["left_behind"]),
        seconds=cast(float, report["seconds"]),
        cpu_seconds=cast(float, report["cpu_seconds"]),
        peak_bytes=cast(int, report["peak_bytes"]),
    )


def clean_environment() -> dict[str, str]:
    """All that a program inherits: nothing of ours."""
    one_thread = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        "HOME": FOLDER,
        "PATH": "/usr/bin",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": "/tmp",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": "/tmp",
        **dict.fromkeys(one_thread, "1"),
    }


@functools.cache
def runner_source() -> bytes:
    return (_ENCLOSURE / "runner.py").read_bytes()
