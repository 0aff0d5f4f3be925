"""File systems that fail on purpose: killed processes, full disks, lost power."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from metis_home.convert.disk import Disk


class CountingDisk(Disk):
    """Counts operations and remembers their names."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.lock_ = threading.Lock()

    def before(self, operation: str, path: str, size: int = 0) -> None:
        with self.lock_:
            self.operations.append(operation)


class KillingDisk(CountingDisk):
    """Kills its process ahead of operation number `point`; where that one writes, after half of the bytes if `torn`."""

    def __init__(self, point: int, torn: bool) -> None:
        super().__init__()
        self.point, self.torn = point, torn

    def before(self, operation: str, path: str, size: int = 0) -> None:
        super().before(operation, path, size)
        if len(self.operations) > self.point and not (self.torn and operation in ("write", "copy")):
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, fd: int, path: Path, data: bytes | memoryview, offset: int) -> None:
        if self.torn and len(self.operations) >= self.point:
            os.pwrite(fd, bytes(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(fd, path, data, offset)

    def copy(self, source: int, source_offset: int, fd: int, path: Path, offset: int, size: int) -> int:
        if self.torn and len(self.operations) >= self.point:
            os.pwrite(fd, os.pread(source, size // 2, source_offset), offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().copy(source, source_offset, fd, path, offset, size)


class FullDisk(Disk):
    """Has room for `room` bytes; `reserves` says whether the file system can promise space ahead."""

    def __init__(self, room: int, reserves: bool) -> None:
        super().__init__()
        self.room, self.reserves = room, reserves

    def before(self, operation: str, path: str, size: int = 0) -> None:
        if operation == ("reserve" if self.reserves else "copy") or (operation == "write" and not self.reserves):
            self.room -= size
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device", path)


class NoExchangeDisk(CountingDisk):
    """A file system that cannot swap two names."""

    def exchange(self, first: Path, second: Path) -> bool:
        self.before("exchange", str(second))
        return False


class PowerLossDisk(Disk):
    """Before every operation builds what a power cut would leave below `root`, in `states/`; then goes on.

    Bytes of a file that were not synced are zeros of the right length. Names that were not synced are lost in one
    state (`lost`) and on the disk in the other (`kept`): a rename may be torn either way.
    """

    def __init__(self, root: Path, states: Path, can_exchange: bool) -> None:
        super().__init__()
        self.root, self.states, self.can_exchange = root, states, can_exchange
        self.contents: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.count = 0
        self.lock_ = threading.Lock()
        for folder, _, names in os.walk(root):  # what is there at the start is on the disk
            self._remember_directory(Path(folder))
            for name in names:
                path = Path(folder, name)
                self.contents[path.stat().st_ino] = path.read_bytes()

    def exchange(self, first: Path, second: Path) -> bool:
        if self.can_exchange:
            return super().exchange(first, second)
        self.before("exchange", str(second))
        return False

    def before(self, operation: str, path: str, size: int = 0) -> None:
        with self.lock_:
            now = {p.stat().st_ino: p for p in [self.root, *self.root.rglob("*")]}
            for kind in ("lost", "kept"):
                state = self.states / f"{self.count:04d}-{kind}-{operation}"
                self._build(self.root.stat().st_ino, state, now, kind == "kept")
            self.count += 1

    def after(self, operation: str, path: str, size: int = 0) -> None:
        with self.lock_:
            if operation == "fsync":
                self.contents[os.stat(path).st_ino] = Path(path).read_bytes()
            if operation == "fsync_directory":
                self._remember_directory(Path(path))

    def _remember_directory(self, folder: Path) -> None:
        self.entries[folder.stat().st_ino] = {p.name: p.stat().st_ino for p in folder.iterdir()}
        for path in folder.iterdir():
            if path.is_dir():
                self.entries.setdefault(path.stat().st_ino, {})

    def _build(self, inode: int, target: Path, now: dict[int, Path], kept: bool) -> None:
        target.mkdir()
        there = now.get(inode)
        entries = {p.name: p.stat().st_ino for p in there.iterdir()} if kept and there else self.entries.get(inode, {})
        for name, child in entries.items():
            path = now.get(child)
            if child in self.entries or (path is not None and path.is_dir()):
                self._build(child, target / name, now, kept)
            else:
                size = path.stat().st_size if path is not None else 0
                (target / name).write_bytes(self.contents.get(child, bytes(size)))


def in_killed_child(work: Callable[[], object]) -> bool:
    """Run `work` in a forked process; True if it was killed, False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the conversion failed instead of being killed"
    return False
