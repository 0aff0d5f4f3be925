"""`convert --link`: a bundle of hard links. The layout and its loader are in `metis_home/link_bundle.py`."""

import errno
from pathlib import Path

from ..branch import Branch
from ..errors import CheckpointError, OutputError
from ..link_bundle import BRANCH_DIRECTORIES, BUNDLE_FILE, ROUTER_FILE, bundle_text
from ..names import ROUTER_PREFIX
from .dense import DenseSource
from .disk import Disk
from .manifest import ORIGINALS
from .options import DEFAULT_SEED, Options, SharedFrom
from .output import check_target
from .plan import PlannedFile
from .upcycling import Conversion, check_apart, open_conversion, silent
from .writing import Progress, write_files


def link(
    thinking: str | Path,
    out_dir: str | Path,
    non_thinking: str | Path | None = None,
    *,
    seed: int = DEFAULT_SEED,
    overwrite: bool = False,
    allow_shared_mismatch: bool = False,
    shared_from: SharedFrom = "thinking",
    router_hidden_size: int | None = None,
    router_pooling: str | None = None,
    progress: Progress = silent,
    disk: Disk | None = None,
) -> Path:
    """Make a link bundle at `out_dir`: both sources as hard links, and a new router. Copies no weight.

    The bundle shares its files with the sources: who writes into one of them in place (no tool here does) changes both.

    Args:
        thinking, non_thinking: directories or hub ids of dense models, on the file system of `out_dir`.
        out_dir: directory to make; its parent must exist.
        seed, overwrite, allow_shared_mismatch, shared_from, router_hidden_size, router_pooling, progress, disk: as in
            `upcycle`; an average cannot be linked.
    Returns:
        `out_dir`.
    Raises:
        CheckpointError: a source cannot be used, or the two do not agree.
        OutputError: `out_dir` cannot be written, or lies on another file system than a source.
    """
    if shared_from == "average":
        raise CheckpointError(
            "an average of shared weights exists in neither source, so it cannot be linked. Leave out --link."
        )
    router = {"router_hidden_size": router_hidden_size, "router_pooling": router_pooling}
    options = Options(
        seed=seed,
        allow_shared_mismatch=allow_shared_mismatch,
        shared_from=shared_from,
        **{name: value for name, value in router.items() if value is not None},  # type: ignore[arg-type]
    )
    out, disk = Path(out_dir), disk or Disk()
    check_target(out, overwrite=overwrite)
    with open_conversion(thinking, non_thinking, options=options, progress=progress) as conversion:
        for source in conversion.sources.values():
            if source.adapter is not None:
                raise CheckpointError(
                    f"{source.adapter.path} is an adapter: its sum with a model cannot be linked. Leave out --link."
                )
        check_apart(out, *(source.path for source in conversion.sources.values()))
        _write(conversion, out.parent.resolve() / out.name, disk)
    return out


def _write(conversion: Conversion, out: Path, disk: Disk) -> None:
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise OutputError(f"{partial} is there: a conversion was stopped, or is running. Remove it.")
    shared = Branch.NON_THINKING if conversion.options.shared_from == "non-thinking" else Branch.THINKING
    try:
        disk.make_directory(partial)
        disk.make_directory(partial / "branches")
        for branch, folder in BRANCH_DIRECTORIES.items():
            _link_directory(conversion.sources[branch], partial / folder, disk)
        disk.sync_directory(partial / "branches")
        # the branches hold the originals themselves
        files = [file for file in conversion.plan.files if not file.name.startswith(f"{ORIGINALS}/")]
        files.append(PlannedFile(ROUTER_FILE, _router(conversion)))
        files.append(PlannedFile(BUNDLE_FILE, bundle_text(shared).encode()))
        write_files(files, partial, disk)
        if out.exists() and any(out.iterdir()):
            if not disk.exchange(partial, out):
                raise OutputError(f"this file system cannot swap directories. Remove {out}, then link again.")
        else:
            disk.rename(partial, out)
        disk.sync_directory(out.parent)
    except OSError as error:
        raise _explained(error, out) from error
    finally:
        disk.remove_tree(partial)


def _link_directory(source: DenseSource, folder: Path, disk: Disk) -> None:
    disk.make_directory(folder)
    checkpoint = source.checkpoint
    for name, file in {**checkpoint.small_files, **checkpoint.shards}.items():
        if name.endswith(".py"):
            continue
        # `path` is where a link of the hub cache leads: the name must outlive the cache's snapshot
        disk.link(file.path, folder / name)
        if (folder / name).stat().st_ino != file.inode:
            raise CheckpointError(
                f"{file.path} was replaced while it was linked. Wait for its writer, then link again."
            )
    disk.sync_directory(folder)


def _router(conversion: Conversion) -> bytes:
    from .plan import WEIGHT_METADATA, shard_of

    planned = [tensor for shard in conversion.plan.shards for tensor in shard.tensors]
    tensors = [(t.name, t.content) for t in planned if t.name.startswith(ROUTER_PREFIX)]
    shard = shard_of(ROUTER_FILE, tensors, WEIGHT_METADATA)
    return shard.header + b"".join(bytes(chunk) for _, content in tensors for chunk in content.chunks())


def _explained(error: OSError, out: Path) -> OSError:
    if isinstance(error, OutputError):
        return error
    if error.errno == errno.EXDEV:
        return OutputError(
            errno.EXDEV,
            f"{out} and a source lie on different file systems; a file has names on one only. Choose an output beside "
            "the sources, or convert without --link.",
        )
    return OutputError(error.errno, f"cannot make the bundle {out}: {error.strerror or error}.")
