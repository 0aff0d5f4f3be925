"""Write planned shards: reserve, copy or compute, put on the disk, digest.

Copying is the main thread's; syncing and digesting a finished shard happen in a second one while the next shard is
copied. Copies stay inside the kernel, so the digest reads the shard once more, from the page cache.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from ..errors import CheckpointError
from .checkpoint import READ_STEP
from .disk import Disk
from .files import OpenFile
from .journal import Digest, Journal
from .plan import PlannedFile, PlannedShard

_AHEAD_FROM = 4 * 2**20  # bytes of a tensor from which a second thread pays
_WRITEBACK_STEP = 8 * 2**20  # bytes

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


def write_shards(
    shards: Iterable[PlannedShard], directory: Path, journal: Journal, disk: Disk, progress: Progress
) -> None:
    """Write all `shards` into `directory` and note each in the journal when it is on the disk.

    Raises:
        CheckpointError: a source changed, or a value does not fit the type asked for.
        OSError: the disk failed or is full.
    """
    shards = list(shards)
    total, done = sum(shard.size for shard in shards), 0
    fds: dict[str, int] = {}
    pending: Future[None] | None = None
    try:
        for shard in shards:  # all space is reserved before the first byte is copied
            fds[shard.name] = disk.create(directory / shard.name)
            disk.reserve(fds[shard.name], directory / shard.name, shard.size)
        with ThreadPoolExecutor(max_workers=1) as finisher:
            for shard in shards:
                done = _fill(shard, fds[shard.name], directory / shard.name, disk, progress, done, total)
                if pending is not None:
                    pending.result()
                pending = finisher.submit(_finish, shard, fds[shard.name], directory / shard.name, journal, disk)
            if pending is not None:
                pending.result()
    finally:
        for fd in fds.values():
            os.close(fd)
    disk.sync_directory(directory)


def write_files(files: Iterable[PlannedFile], directory: Path, disk: Disk) -> dict[str, Digest]:
    """Write the small files, in sub-directories where their names say so; returns their digests by name."""
    digests, made = {}, {directory}
    for file in files:
        path = directory / file.name
        for parent in reversed(path.relative_to(directory).parents):
            folder = directory / parent
            if folder not in made and not folder.is_dir():
                disk.make_directory(folder)
            made.add(folder)
        fd = disk.create(path)
        try:
            if isinstance(file.content, bytes):
                disk.write(fd, path, file.content, 0)
            else:
                _copy(file.content, 0, fd, path, 0, file.size, disk, lambda count: None)
                file.content.check_unchanged()
            disk.sync(fd, path)
            digests[file.name] = digest_of(fd, file.size)
        finally:
            os.close(fd)
    for folder in sorted(made, reverse=True):
        disk.sync_directory(folder)
    return digests


def digest_of(fd: int, size: int, parts: Iterable[tuple[str, int, int]] = ()) -> Digest:
    """Digest the open file, and parts of it on the way.

    Args:
        fd: open for reading.
        size: bytes of the file.
        parts: (name, offset, bytes), in order, without overlap.
    Raises:
        CheckpointError: the file is shorter than `size`.
    """
    whole, tensors = xxhash.xxh3_128(), {}
    buffer = memoryview(bytearray(READ_STEP))
    position = 0

    def read_to(end: int, part: "xxhash.xxh3_128 | None") -> None:
        nonlocal position
        while position < end:
            count = os.preadv(fd, [buffer[: min(len(buffer), end - position)]], position)
            if not count:
                raise CheckpointError(f"a file of {size} bytes ended at byte {position} while it was read.")
            whole.update(buffer[:count])
            if part is not None:
                part.update(buffer[:count])
            position += count

    for name, offset, length in parts:
        read_to(offset, None)
        part = xxhash.xxh3_128()
        read_to(offset + length, part)
        tensors[name] = part.hexdigest()
    read_to(size, None)
    return Digest(size=size, xxh3_128=whole.hexdigest(), tensors=tensors)


def digest_shard(shard: PlannedShard, fd: int) -> Digest:
    """Digest an open shard that should be as planned."""
    return digest_of(fd, shard.size, ((tensor.name, tensor.offset, tensor.content.size) for tensor in shard.tensors))


def _fill(shard: PlannedShard, fd: int, path: Path, disk: Disk, progress: Progress, done: int, total: int) -> int:
    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("copying", done, total)

    disk.write(fd, path, shard.header, 0)
    advance(len(shard.header))
    touched: dict[int, OpenFile] = {}
    for run in shard.runs():
        if isinstance(run, tuple):
            first, offset, size = run
            touched[first.file.fd] = first.file
            _copy(first.file, first.offset, fd, path, offset, size, disk, advance)
            continue
        position = started = run.offset
        for chunk in _ahead(run.content.chunks()) if run.content.size > _AHEAD_FROM else run.content.chunks():
            disk.write(fd, path, chunk, position)
            position += len(chunk)
            advance(len(chunk))
            if position - started >= _WRITEBACK_STEP:
                disk.start_writeback(fd, started, position - started)
                started = position
        if position != run.offset + run.content.size:
            raise CheckpointError(f"{run.name!r} came out {position - run.offset} bytes long, not {run.content.size}.")
    for file in touched.values():
        file.check_unchanged()
    return done


def _ahead(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same chunks; the next is read and computed in another thread while this one is written."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        pending = worker.submit(next, chunks, None)
        while (chunk := pending.result()) is not None:
            pending = worker.submit(next, chunks, None)
            yield chunk


def _copy(
    source: OpenFile,
    source_offset: int,
    fd: int,
    path: Path,
    offset: int,
    size: int,
    disk: Disk,
    advance: Callable[[int], None],
) -> None:
    copied = 0
    while copied < size:
        count = disk.copy(source.fd, source_offset + copied, fd, path, offset + copied, size - copied)
        if count == 0:
            raise CheckpointError(
                f"{source.path} became shorter while it was copied. Wait for its writer, then convert again."
            )
        copied += count
        advance(count)


def _finish(shard: PlannedShard, fd: int, path: Path, journal: Journal, disk: Disk) -> None:
    disk.sync(fd, path)
    journal.record(shard.name, digest_shard(shard, fd))
