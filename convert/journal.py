"""What an unfinished output directory already holds for certain: one JSON line per finished shard.

A line is appended after its shard is on the disk, and is itself on the disk before the next begins. A crash can tear
the last line only; a torn line is as good as none.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from .disk import Disk

JOURNAL_FILE = ".metis_home_journal"


@dataclass(frozen=True, slots=True)
class Digest:
    """A finished file: bytes, XXH3-128 of the whole and, of a shard, of each tensor; hexadecimal."""

    size: int
    xxh3_128: str
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Journal:
    """The journal of one output directory, open for appending."""

    path: Path
    fingerprint: str
    done: dict[str, Digest]
    disk: Disk
    fd: int
    position: int

    @classmethod
    def start(cls, directory: Path, fingerprint: str, disk: Disk) -> "Journal":
        """Begin a new journal in `directory`."""
        path = directory / JOURNAL_FILE
        fd = disk.create(path)
        journal = cls(path=path, fingerprint=fingerprint, done={}, disk=disk, fd=fd, position=0)
        journal._append({"fingerprint": fingerprint})
        disk.sync_directory(directory)
        return journal

    @classmethod
    def load(cls, directory: Path, disk: Disk) -> "Journal | None":
        """Open the journal in `directory`; None if there is none, or none that says what it is for."""
        path = directory / JOURNAL_FILE
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        fingerprint, done, position = "", {}, 0
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if "fingerprint" in entry:
                    fingerprint = str(entry["fingerprint"])
                else:
                    done[str(entry["file"])] = Digest(
                        int(entry["size"]), str(entry["xxh3_128"]), dict(entry["tensors"])
                    )
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            position += len(line)
        if not fingerprint:
            os.close(fd)
            return None
        return cls(path=path, fingerprint=fingerprint, done=done, disk=disk, fd=fd, position=position)

    def record(self, file_name: str, digest: Digest) -> None:
        """Note that `file_name` is on the disk."""
        self._append({"file": file_name, "size": digest.size, "xxh3_128": digest.xxh3_128, "tensors": digest.tensors})
        self.done[file_name] = digest

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self.fd)

    def _append(self, entry: dict[str, object]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        self.disk.write(self.fd, self.path, line, self.position)
        self.position += len(line)
        os.ftruncate(self.fd, self.position)  # what a torn line left behind
        self.disk.sync(self.fd, self.path)
