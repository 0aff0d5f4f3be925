"""The last steps of the process that becomes the program: limits, no rights, no dangerous calls, then exec."""

import os
import resource

from . import kernel, seccomp

# Wire names of the limits that the kernel itself enforces on each process, and what setrlimit calls them.
_PER_PROCESS = {
    "process_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
}
# RLIMIT_NPROC counts all processes and threads of this user namespace: its first process and the program are two.
_OTHER_PROCESSES = 2
_EXEC_FAILED = 126


def become(
    argv: list[str],
    environment: dict[str, str],
    limits: dict[str, float],
    output: tuple[int, int],
    *,
    enclosed: bool,
) -> None:
    """Turn this process into the program; never returns.

    Args:
        output: file descriptors that become its standard output and standard error.
        enclosed: False leaves rights and system calls alone (`unsafe_local`).
    """
    try:
        os.setsid()
        os.nice(5)  # what watches must always get its turn
        null = os.open("/dev/null", os.O_RDONLY)
        for target, source in enumerate((null, *output)):
            os.dup2(source, target)
        os.closerange(3, 4096)
        set_limits(limits, enclosed=enclosed)
        if enclosed:
            kernel.drop_all_capabilities()
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.apply_filter()
        os.execve(argv[0], argv, environment)
    except BaseException as error:
        os.write(2, f"the program could not be started: {error}\n".encode())
    finally:
        os._exit(_EXEC_FAILED)


def set_limits(limits: dict[str, float], *, enclosed: bool = True) -> None:
    """setrlimit for what each process may use; soft and hard alike, so that they cannot be raised again."""
    for name, kind in _PER_PROCESS.items():
        _limit(kind, int(limits[name]))
    cpu = max(1, int(limits["cpu_seconds"]))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU, then SIGKILL
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        _limit(kind, 0)
    if enclosed:  # outside a user namespace of its own it would count everything that the user runs
        _limit(resource.RLIMIT_NPROC, int(limits["processes"]) + _OTHER_PROCESSES)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
