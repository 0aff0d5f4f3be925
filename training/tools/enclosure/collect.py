"""What a program left in its folder, read when nothing runs any more: regular files within limits, nothing else.

Links, pipes, sockets and devices are never followed or opened; they are named as left out. What comes back fits into the
folder of the next program, whatever it was here: a sparse file counts in full, and every file in whole pages.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False  # as typing's, without the 10 ms that importing typing takes
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEPTH = 8
MAX_NAME_BYTES = 200
_LISTED = 20  # so many names of left out files are reported

_PAGE = os.sysconf("SC_PAGE_SIZE")
_OWN_FOLDERS = 3  # of a writable file system: its root, and the two places where it is seen

Stamp = tuple[int, int, int]
Snapshot = dict[str, Stamp]


class Room:
    """What fits into the writable file system, which counts pages, files and folders."""

    def __init__(self, *, max_files: int, max_bytes: int) -> None:
        self._files, self._bytes = max_files - _OWN_FOLDERS, in_pages(max_bytes)
        self._limits = f"more than {self._files} files and folders", f"more than {max_bytes} in all"
        self._folders = {"", "/"}  # where every name begins

    def refuse(self, name: str, size: int) -> str | None:
        """Take the room of a file with this relative name; or say why there is none."""
        folders, folder = set(), os.path.dirname(name)
        while folder not in self._folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
        if len(folders) + 1 > self._files:
            return self._limits[0]
        if in_pages(size) > self._bytes:
            return f"{size} bytes, {self._limits[1]}"
        self._files -= len(folders) + 1
        self._bytes -= in_pages(size)
        self._folders |= folders
        return None


def in_pages(size: int) -> int:
    """Bytes that a file of this size takes."""
    return -(-size // _PAGE) * _PAGE


def snapshot(root: str) -> Snapshot:
    """A stamp (inode, size, time of change in ns) for every regular file; nothing inside can forge the last one."""
    return {name: stamp for name, _, stamp in _regular_files(root, [])}


def collect(
    root: str, before: Snapshot, *, max_files: int, max_bytes: int
) -> tuple[list[tuple[str, bytes]], list[str], list[str]]:
    """Return (changed files, names that are still there, what was left out and why)."""
    changed: list[tuple[str, bytes]] = []
    kept: list[str] = []
    left_out: list[str] = []
    room = Room(max_files=max_files, max_bytes=max_bytes)
    for name, path, stamp in sorted(_regular_files(root, left_out)):
        if (problem := room.refuse(name, stamp[1])) is not None:
            left_out.append(f"{name}: {problem}")
            continue
        kept.append(name)
        if before.get(name) != stamp:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                changed.append((name, file.read(stamp[1])))
    if len(left_out) > _LISTED:
        left_out = [*left_out[:_LISTED], f"and {len(left_out) - _LISTED} more"]
    return changed, kept, left_out


def is_plain_name(name: str) -> bool:
    """A relative path of harmless components: printable, no dots that climb, not hidden at the top, not too long."""
    parts = name.split("/")
    return (
        name.isprintable()
        and len(parts) <= MAX_DEPTH
        and all(part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in parts)
    )


def _regular_files(root: str, left_out: list[str]) -> Iterator[tuple[str, str, Stamp]]:
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if not is_plain_name(name):
                    left_out.append(f"{name[:80]!r}: not a plain name, or too deep")
                    continue
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(name)
                elif stat.S_ISREG(status.st_mode):
                    yield name, entry.path, (status.st_ino, status.st_size, status.st_ctime_ns)
                else:
                    left_out.append(f"{name}: {_kind(status.st_mode)}")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "not a regular file")
