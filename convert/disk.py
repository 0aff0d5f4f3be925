"""Every change to the file system goes through here, so that tests can stop the machine between any two of them.

`before` is called ahead of each operation and `after` behind it; both do nothing here. A test that overrides them kills
the process, fills the disk or records what was synced.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

from . import syscalls

COPY_STEP = 32 * 2**20  # bytes per system call: progress, Ctrl-C and early write-back come this often
_BUFFER = 2**20
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM}


class Disk:
    """Write files, copy byte ranges between them, make the result durable."""

    def __init__(self) -> None:
        self._copy_methods = [self._copy_file_range, self._copy_sendfile, self._copy_buffered]

    def before(self, operation: str, path: str, size: int = 0) -> None:
        """Called ahead of each operation; `size` in bytes where it writes."""

    def after(self, operation: str, path: str, size: int = 0) -> None:
        """Called behind each operation that succeeded."""

    def make_directory(self, path: Path) -> None:
        """Create one directory; it must not exist."""
        self.before("mkdir", str(path))
        path.mkdir()
        self.after("mkdir", str(path))

    def create(self, path: Path) -> int:
        """Open a file for writing that did not exist, or a plain file of ours to write again from its start."""
        self.before("create", str(path))
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self.after("create", str(path))
        return fd

    def reserve(self, fd: int, path: Path, size: int) -> None:
        """Give the file its final size and, where the file system can, the disk space for it.

        Raises:
            OSError: ENOSPC and the like, before anything was copied.
        """
        self.before("reserve", str(path), size)
        if size and not syscalls.allocate(fd, size):
            os.ftruncate(fd, size)
        self.after("reserve", str(path), size)

    def write(self, fd: int, path: Path, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        while view:
            self.before("write", str(path), len(view))
            count = os.pwrite(fd, view, offset)
            self.after("write", str(path), count)
            view, offset = view[count:], offset + count

    def start_writeback(self, fd: int, offset: int, size: int) -> None:
        """Let the kernel begin to write this range to the disk; a later `sync` then waits less."""
        syscalls.start_writeback(fd, offset, size)

    def copy(self, source: int, source_offset: int, fd: int, path: Path, offset: int, size: int) -> int:
        """Copy at most `size` bytes between open files inside the kernel where it can; returns how many.

        0 means that the source ended early.
        """
        size = min(size, COPY_STEP)
        self.before("copy", str(path), size)
        while True:
            method = self._copy_methods[0]
            try:
                count = method(source, source_offset, fd, offset, size)
                break
            except OSError as error:
                if error.errno not in _CANNOT_COPY or len(self._copy_methods) == 1:
                    raise
                self._copy_methods.pop(0)  # this pair of file systems cannot; the next method is slower
        if count:
            self.start_writeback(fd, offset, count)
        self.after("copy", str(path), count)
        return count

    def sync(self, fd: int, path: Path) -> None:
        """Wait until the file's bytes are on the disk."""
        self.before("fsync", str(path))
        os.fsync(fd)
        self.after("fsync", str(path))

    def sync_directory(self, path: Path) -> None:
        """Wait until the directory's entries are on the disk."""
        self.before("fsync_directory", str(path))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self.after("fsync_directory", str(path))

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a small file and wait until its bytes are on the disk."""
        fd = self.create(path)
        try:
            self.write(fd, path, data, 0)
            self.sync(fd, path)
        finally:
            os.close(fd)

    def link(self, source: Path, path: Path) -> None:
        """Make `path` another name of the file `source`."""
        self.before("link", str(path))
        os.link(source, path, follow_symlinks=False)
        self.after("link", str(path))

    def rename(self, source: Path, target: Path) -> None:
        """Rename; an empty directory at `target` is replaced."""
        self.before("rename", str(target))
        os.rename(source, target)
        self.after("rename", str(target))

    def exchange(self, first: Path, second: Path) -> bool:
        """Swap two names in one step; False where the file system cannot."""
        self.before("exchange", str(second))
        done = syscalls.exchange(str(first), str(second))
        self.after("exchange", str(second))
        return done

    def remove_file(self, path: Path) -> None:
        """Remove one file; it may be gone already."""
        self.before("unlink", str(path))
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self.after("unlink", str(path))

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all below it; it may be gone already. Links are removed, never followed."""
        self.before("remove_tree", str(path))
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
        self.after("remove_tree", str(path))

    @staticmethod
    def lock(directory: Path) -> int | None:
        """Lock `directory` until the returned descriptor is closed, or the process ends; None if another has it."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    @staticmethod
    def _copy_file_range(source: int, source_offset: int, fd: int, offset: int, size: int) -> int:
        if not hasattr(os, "copy_file_range"):
            raise OSError(errno.ENOSYS, "no copy_file_range on this system")
        return os.copy_file_range(source, fd, size, source_offset, offset)

    @staticmethod
    def _copy_sendfile(source: int, source_offset: int, fd: int, offset: int, size: int) -> int:
        os.lseek(fd, offset, os.SEEK_SET)  # sendfile writes at the file's position
        return os.sendfile(fd, source, source_offset, size)

    @staticmethod
    def _copy_buffered(source: int, source_offset: int, fd: int, offset: int, size: int) -> int:
        data = os.pread(source, min(size, _BUFFER), source_offset)
        return os.pwrite(fd, data, offset)
