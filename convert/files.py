"""Open the files of a checkpoint that a stranger made: nothing outside its directory, nothing that is no plain file.

Files are opened once and read through that descriptor only, so what was checked is what is copied.
"""

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

SMALL_FILE_BYTES = 64 * 2**20  # tokenizer.json of Qwen2.5 has 7 MB


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A plain file, open for reading, with what it looked like then."""

    name: str
    path: Path
    """Where the bytes are; differs from the name in the directory for a link into the hub cache."""
    fd: int
    size: int
    mtime_ns: int
    inode: int

    def check_unchanged(self) -> None:
        """Raise when the file is no longer the one that was opened.

        Raises:
            CheckpointError: its size or time changed, or another file has its name now.
        """
        now = os.fstat(self.fd)
        there = None
        with contextlib.suppress(OSError):
            there = os.stat(self.path, follow_symlinks=False)
        same = (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)
        if not same or there is None or there.st_ino != self.inode:
            raise CheckpointError(
                f"{self.path} changed while it was read. Wait until its writer has finished, then convert again."
            )

    def read(self) -> bytes:
        """The whole content; for small files.

        Raises:
            CheckpointError: larger than 64 MiB, or shorter than it was.
        """
        if self.size > SMALL_FILE_BYTES:
            raise CheckpointError(
                f"{self.path}: {self.size} bytes; at most {SMALL_FILE_BYTES} are read for such a file."
            )
        return self.read_range(0, self.size)

    def will_need(self, offset: int, size: int) -> None:
        """Let the kernel begin to read this range; does not wait."""
        if hasattr(os, "posix_fadvise"):  # Linux has it, macOS has not
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def read_range(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
            CheckpointError: the file became shorter.
        """
        data = os.pread(self.fd, size, offset)
        while len(data) < size:  # a signal or a network file system may give less than was asked for
            part = os.pread(self.fd, size - len(data), offset + len(data))
            if not part:
                raise CheckpointError(
                    f"{self.path} became shorter while it was read. Wait for its writer, then convert again."
                )
            data += part
        return data


def is_plain_name(name: str) -> bool:
    """Is `name` one path component, with no way out of its directory?"""
    return (
        bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"} and os.path.basename(name) == name
    )


def resolve_inside(directory: Path, name: str) -> Path:
    """Where the bytes of `directory/name` are.

    A link may lead elsewhere inside the directory, or from a snapshot of the hub cache into the blobs of the same
    repository; nowhere else.

    Raises:
        CheckpointError: the name has separators, or the link leads outside.
    """
    if not is_plain_name(name):
        raise CheckpointError(
            f"{directory}: the file name {name!r} is no plain name. A checkpoint may only name files beside it; "
            "this one may have been forged."
        )
    root = directory.resolve()
    target = (root / name).resolve()
    if target.is_relative_to(root):
        return target
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and target.parent == blobs.resolve():
        return target
    raise CheckpointError(
        f"{directory / name} is a link to {target}, outside the checkpoint. Copy the file into the directory."
    )


def open_inside(directory: Path, name: str) -> OpenFile:
    """Open the plain file `directory/name` for reading; the caller closes `fd`.

    Raises:
        CheckpointError: it leads outside, is missing, is no plain file, or cannot be read.
    """
    path = resolve_inside(directory, name)
    try:
        # O_NONBLOCK: a named pipe must not hang us before we can refuse it
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{directory / name} does not exist. Is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{directory / name} cannot be read: {error.strerror}.") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise CheckpointError(f"{directory / name} is no plain file.")
    return OpenFile(name=name, path=path, fd=fd, size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino)
