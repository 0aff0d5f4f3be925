"""The file system of the enclosure: an empty one, with read-only copies of a few trees and one small folder to write.

/scratch /tmp /dev/shm    one tmpfs of limited size and number of files: the only place that can be written
/program                  the program and its runner, read-only
/usr/lib, the interpreter and its packages ...   as outside, read-only, no devices, nothing setuid
/dev                      null, zero, full, random, urandom
there is no /proc, no /sys, no /home, no /etc but a passwd of one line
"""

from __future__ import annotations

import os
import stat

from . import kernel
from .collect import in_pages

TYPE_CHECKING = False  # as typing's, without the 10 ms that importing typing takes
if TYPE_CHECKING:
    from collections.abc import Sequence

SCRATCH, TEMPORARY, PROGRAM = "/scratch", "/tmp", "/program"
INNER_ID = 1000
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_STAGES = ("/tmp", "/mnt", "/usr")  # any directory will do: it is covered only in here
_PASSWD = f"sandbox:x:{INNER_ID}:{INNER_ID}:sandbox:{SCRATCH}:/bin/false\n"


def copy_trees(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Take detached read-only copies of files and trees; (path, mount) each.

    Called while the process still has the user id of the outside: it must be able to reach them.
    """
    taken = []
    for path in paths:
        fd = kernel.open_tree(path)
        kernel.restrict_mount(fd, kernel.RDONLY | kernel.NOSUID | kernel.NODEV)
        taken.append((path, fd))
    for path in _DEVICES:
        fd = kernel.open_tree(path)
        kernel.restrict_mount(fd, kernel.RDONLY | kernel.NOSUID | kernel.NOEXEC)
        taken.append((path, fd))
    return taken


def build_root(
    trees: list[tuple[str, int]],
    links: Sequence[tuple[str, str]],
    files: Sequence[tuple[str, bytes]],
    *,
    scratch_bytes: int,
    scratch_files: int,
) -> None:
    """Make the new root, fill it, and move into it; nothing of the old one stays reachable.

    Args:
        links: (path, target) of symbolic links to recreate, such as /lib -> usr/lib.
        files: (absolute path, content) below /program, /scratch or /tmp; those below /tmp have room of their own.
    """
    stage = next(path for path in _STAGES if os.path.isdir(path))
    program_bytes = sum(len(content) for path, content in files if path.startswith(PROGRAM + "/"))
    root = kernel.new_filesystem("tmpfs", size=str(program_bytes + (4 << 20)), mode="0755")
    kernel.move_mount(root, stage)
    os.fchdir(root)
    for path, target in links:
        os.makedirs(_here(os.path.dirname(path)), exist_ok=True)
        os.symlink(target, _here(path))
    for path in (SCRATCH, TEMPORARY, PROGRAM, "/etc"):
        os.makedirs(_here(path), exist_ok=True)
    _write(_here("/etc/passwd"), _PASSWD.encode())
    given = [in_pages(len(content)) for path, content in files if path.startswith(TEMPORARY + "/")]
    limits = {"size": str(scratch_bytes + sum(given)), "nr_inodes": str(scratch_files + len(given))}
    scratch = kernel.new_filesystem("tmpfs", **limits, mode="0700")
    kernel.move_mount(scratch, _here(SCRATCH))
    # Two folders of one tmpfs share its limit; each covers the place where it is wanted.
    for name in ("folder", "temporary"):
        os.mkdir(f"{_here(SCRATCH)}/{name}")
    folder, temporary = (kernel.open_tree(f"{_here(SCRATCH)}/{name}") for name in ("folder", "temporary"))
    kernel.move_mount(folder, _here(SCRATCH))
    kernel.move_mount(temporary, _here(TEMPORARY))
    for path, fd in trees:  # after /tmp is there: an interpreter may live below it
        _place(path, fd)
    os.symlink("../tmp", _here("/dev/shm"))
    for path, content in files:
        os.makedirs(os.path.dirname(_here(path)), exist_ok=True)
        _write(_here(path), content)
    kernel.make_working_directory_the_root()
    kernel.restrict_mount(root, kernel.RDONLY | kernel.NOSUID | kernel.NODEV, recursive=False)
    os.close(root)
    os.chdir(SCRATCH)


def _place(path: str, fd: int) -> None:
    here = _here(path)
    os.makedirs(os.path.dirname(here), exist_ok=True)
    if os.path.lexists(here):  # already part of a tree placed before
        os.close(fd)
        return
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.mkdir(here)
    else:
        _write(here, b"")
    kernel.move_mount(fd, here)
    os.close(fd)


def _here(path: str) -> str:
    return "." + path


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", opener=lambda name, _: os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)) as file:
        file.write(content)
