"""Start the enclosure: reads a request on standard input, writes one report to standard output.

Runs as `python -I -S` in a process of its own with a clean environment, so that it may change namespaces and ids
without touching the caller, who may have threads and a GPU.
"""

from __future__ import annotations

import os
import signal
import sys

from . import inside, kernel, mounts, wire

_UNPRIVILEGED_ID = 65534  # nobody: whom root becomes outside, as limits and permissions do not bind root


def main() -> None:
    """Report {"error": ...} where the enclosure cannot be made; exit status 0 either way."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # the caller is gone: so is all this
    request, files = wire.unpack(sys.stdin.buffer.read())
    try:
        _prefer_as_victim()
        report = _enclose(request, files)  # type: ignore[arg-type]  # our own caller wrote it
    except OSError as error:
        report = wire.pack({"error": f"{error} (errno {error.errno})"}, [])
    if report:
        _send(report)


def _enclose(request: wire.Request, files: wire.Files) -> bytes | None:
    """Clone into new namespaces; what runs there sends its report itself."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setgroups([])
    mapped_read, mapped_write = os.pipe()
    child = kernel.clone(kernel.ALL_NAMESPACES)
    if child == 0:
        try:
            os.close(mapped_write)
            if os.read(mapped_read, 1):  # nothing: the launcher failed and reports why
                _send(inside.run(request, files))
        except BaseException as error:
            _send(wire.pack({"error": f"{type(error).__name__}: {error}"}, []))
        finally:
            os._exit(0)
    os.close(mapped_read)
    try:
        _map_ids(child, is_root)
        os.write(mapped_write, b"x")
    finally:
        os.close(mapped_write)
        os.waitpid(child, 0)
    return None


def _map_ids(child: int, is_root: bool) -> None:
    """One user and one group exist inside. Root's files must not be that user's, so root maps somebody else."""
    outer_user, outer_group = (_UNPRIVILEGED_ID,) * 2 if is_root else (os.geteuid(), os.getegid())
    if not is_root:
        _write(f"/proc/{child}/setgroups", "deny")
    _write(f"/proc/{child}/uid_map", f"{mounts.INNER_ID} {outer_user} 1")
    _write(f"/proc/{child}/gid_map", f"{mounts.INNER_ID} {outer_group} 1")


def _prefer_as_victim() -> None:
    """Where memory runs out all the same, the kernel ends this first; without /proc it chooses by size."""
    path = "/proc/self/oom_score_adj"
    if os.access(path, os.W_OK):
        _write(path, "1000")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"{path} = {text!r}: {error.strerror}") from error
    finally:
        os.close(fd)


def _send(message: bytes) -> None:
    view = memoryview(message)
    while view:
        view = view[os.write(1, view) :]
