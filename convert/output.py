"""An output directory that appears complete or not at all.

    OUT.partial/     shards, small files, journal        grows; what a crash leaves, and --resume continues
    OUT.partial/metis_home_manifest.json                 written last
    OUT                                                  by rename; an old OUT is swapped out in the same step

After a crash there is either the old state, or OUT.partial with its journal, or the finished OUT.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, MetisHomeError, OutputError
from .disk import Disk
from .journal import JOURNAL_FILE, Digest, Journal
from .plan import Plan, PlannedFile
from .writing import Progress, digest_shard, write_files, write_shards

MANIFEST_FILE = "metis_home_manifest.json"
_SPACE_MARGIN = 64 * 2**20  # bytes: journal, index, manifest, directories


@dataclass(frozen=True, slots=True)
class Written:
    """What is on the disk: digests of shards and of small files by name."""

    shards: dict[str, Digest]
    files: dict[str, Digest]


LateFiles = Callable[[Written], list[PlannedFile]]
"""Makes the files that need the digests of the others; the last one is the manifest."""


def write_output(
    plan: Plan,
    out: Path,
    late_files: LateFiles,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    disk: Disk,
) -> None:
    """Carry out `plan` at `out`.

    Args:
        plan: what to write.
        out: the directory to appear; its parent must exist.
        late_files: called once all else is on the disk.
        resume: continue what a stopped run left in `OUT.partial`; an `out` that is this plan's, complete, is left as it is.
        overwrite: an old checkpoint at `out` is replaced, in one step, when the new one is complete.
        progress: called after each piece.
        disk: the file system.
    Raises:
        OutputError: `out` is taken, in use or cannot be written; the disk is full.
        CheckpointError: a source changed or does not fit.
    """
    out = out.parent.resolve() / out.name
    partial = out.with_name(out.name + ".partial")
    check_target(out, overwrite=overwrite, resume=resume)
    if resume and _finish_renamed(out, partial, plan, disk):
        return
    if resume and not (partial.exists() or partial.is_symlink()):
        if not overwrite and _fingerprint(out, disk) is not None:
            raise OutputError(
                f"{out} is complete, but it was made from other sources or with other options, or the sources were written "
                "again since. Choose another directory, or replace it with --overwrite."
            )
        check_target(out, overwrite=overwrite)
    with _partial_directory(out, partial, plan, resume=resume, disk=disk) as journal:
        missing = []
        for shard in plan.shards:
            if not _is_intact(partial / shard.name, journal.done.get(shard.name), plan, progress):
                journal.done.pop(shard.name, None)
                missing.append(shard)
        write_shards(missing, partial, journal, disk, progress)
        files = write_files(plan.files, partial, disk)
        late = late_files(Written(shards={s.name: journal.done[s.name] for s in plan.shards}, files=files))
        write_files(late, partial, disk)
        _appear(out, partial, disk)
    _finish_renamed(out, partial, plan, disk)


def check_target(out: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Raise OutputError unless a checkpoint may appear at `out`."""
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} does not exist. Create it first.")
    if out.is_symlink():
        raise OutputError(f"{out} is a link. Give the directory itself.")
    if not out.exists() or resume:
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file. Give a directory that does not exist yet.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} is not empty. Choose another directory, or replace it with --overwrite.")
    if not (out / "config.json").is_file():
        raise OutputError(f"{out} holds no config.json, so it is no checkpoint: not replaced. Remove it yourself.")


def check_space(plan: Plan, out: Path, already: int = 0) -> tuple[int, int]:
    """Return (bytes needed, bytes free) where `out` will be.

    Raises:
        OutputError: not enough.
    """
    needed = plan.size - already + _SPACE_MARGIN
    free = free_space(out)
    if needed > free:
        raise OutputError(
            errno.ENOSPC,
            f"{out.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed. Free some of it.",
        )
    return needed, free


def free_space(out: Path) -> int:
    """Bytes that this user may still write beside `out`."""
    found = os.statvfs(out.parent)
    return found.f_bavail * found.f_frsize


@contextmanager
def _partial_directory(out: Path, partial: Path, plan: Plan, *, resume: bool, disk: Disk) -> Iterator[Journal]:
    """Make or continue `OUT.partial`, locked; on an error decide whether it is worth keeping."""
    continues = partial.exists() or partial.is_symlink()
    if continues and not resume:
        raise OutputError(
            f"{partial} is there: a conversion was stopped, or is running. Continue it with --resume, or remove it."
        )
    lock = journal = None
    made = False
    try:
        if not continues:
            check_space(plan, out)
            disk.make_directory(partial)
            made = True
        lock = disk.lock(partial)
        if lock is None:
            raise OutputError(f"another process is writing {partial}. Wait for it.")
        if continues:
            journal = _journal_to_continue(partial, plan, disk)
            already = sum(file.stat().st_blocks * 512 for file in partial.iterdir() if file.is_file())
            check_space(plan, out, already=min(already, plan.size))
        else:
            journal = Journal.start(partial, plan.fingerprint, disk)
            disk.sync_directory(out.parent)
        made = True  # from here on it is ours, also one that we continue
        yield journal
    except BaseException as error:
        # A fault of the sources cannot be continued; a full disk or Ctrl-C can, if a shard is finished.
        keep = journal is not None and bool(journal.done) and not isinstance(error, CheckpointError)
        if made and not keep:
            disk.remove_tree(partial)
        if isinstance(error, MetisHomeError) or not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "Free some space." if full else "Is the disk writable?"
        hint = " Then run the same command with --resume." if keep else ""
        raise OutputError(
            error.errno, f"cannot write {error.filename or partial}: {error.strerror or error}. {what}{hint}"
        ) from error
    finally:
        if journal is not None:
            journal.close()
        if lock is not None:
            os.close(lock)


def _journal_to_continue(partial: Path, plan: Plan, disk: Disk) -> Journal:
    journal = Journal.load(partial, disk)
    if journal is None and all(entry.name == JOURNAL_FILE for entry in partial.iterdir()):
        return Journal.start(partial, plan.fingerprint, disk)  # stopped before the first line was on the disk
    if journal is None:
        raise OutputError(f"{partial} was not left by a conversion. Remove it, or choose another output.")
    if journal.fingerprint != plan.fingerprint:
        journal.close()
        raise OutputError(
            f"{partial} was begun from other sources or with other options. Repeat the command that began it, or "
            "remove the directory."
        )
    return journal


def _is_intact(path: Path, digest: Digest | None, plan: Plan, progress: Progress) -> bool:
    if digest is None:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        shard = next(shard for shard in plan.shards if shard.name == path.name)
        progress("checking", 0, shard.size)
        return os.fstat(fd).st_size == shard.size and digest_shard(shard, fd) == digest
    finally:
        os.close(fd)


def _appear(out: Path, partial: Path, disk: Disk) -> None:
    if not out.exists() or not any(out.iterdir()):
        disk.rename(partial, out)
    elif not disk.exchange(partial, out):
        # Two steps where the file system cannot swap: a crash in between leaves the old one under `_replaced(out)`.
        disk.remove_tree(_replaced(out))
        disk.rename(out, _replaced(out))
        try:
            disk.rename(partial, out)
        except OSError:
            disk.rename(_replaced(out), out)
            raise
    disk.sync_directory(out.parent)


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.metis_home_replaced")


def _finish_renamed(out: Path, partial: Path, plan: Plan, disk: Disk) -> bool:
    """Tidy up after `out` appeared: the replaced directory and the journal go. False if `out` is not this plan's."""
    if _fingerprint(out, disk) != plan.fingerprint:
        return False
    # What we replaced lies under `partial` now; an unfinished conversion has a journal and no manifest.
    if (partial / MANIFEST_FILE).exists() or not (partial / JOURNAL_FILE).exists():
        disk.remove_tree(partial)
    disk.remove_tree(_replaced(out))
    disk.remove_file(out / JOURNAL_FILE)
    disk.sync_directory(out)
    return True


def _fingerprint(out: Path, disk: Disk) -> str | None:
    journal = Journal.load(out, disk)
    if journal is not None:
        journal.close()
        return journal.fingerprint
    try:
        found = json.loads((out / MANIFEST_FILE).read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
