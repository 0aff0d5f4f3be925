"""Dense checkpoint(s) -> one two-branch checkpoint."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..branch import Branch
from ..errors import CheckpointError
from ..names import ROUTER_PREFIX, is_dense_ffn, to_branch_name
from ..router_layout import router_tensors
from .card import model_card
from .checkpoint import INDEX_FILE
from .contents import Average, Cast, Content, Fresh
from .dense import DenseSource
from .disk import Disk
from .floats import CONFIG_NAMES, DTYPE_NAMES
from .manifest import BranchRecord, Manifest, branch_digest, tensor_digests
from .options import DEFAULT_SEED, DtypeOption, Options, SharedFrom, parse_size
from .output import MANIFEST_FILE, Written, check_target, write_output
from .plan import Plan, PlannedFile, file_identities, fingerprint, lay_out
from .shared import SharedDifference, check_same_shape, compare_shared, refuse_differences
from .small_files import CARD_FILE, SmallFiles, plan_small_files
from .sources import open_source
from .writing import Progress


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """An open conversion: sources, options and the plan made of them."""

    sources: dict[Branch, DenseSource]
    options: Options
    small: SmallFiles
    differences: list[SharedDifference]
    plan: Plan

    def late_files(self, written: Written) -> list[PlannedFile]:
        """Index, card and manifest: what needs the digests of everything else."""
        files = []
        index = self.plan.index()
        if index is not None:
            files.append(PlannedFile(INDEX_FILE, index))
        manifest = self.manifest(written, Path())
        files.append(PlannedFile(CARD_FILE, model_card(manifest, self.sources[Branch.THINKING])))
        files.append(PlannedFile(MANIFEST_FILE, manifest.to_bytes()))
        return files

    def manifest(self, written: Written, out: Path) -> Manifest:
        """The record of this conversion."""
        return Manifest(
            path=out,
            fingerprint=self.plan.fingerprint,
            version=package_version(),
            options=self.options.to_json(),
            branches={branch: self._record(branch, written) for branch in reversed(Branch)},
            shared_mismatch=[difference.to_json() for difference in self.differences],
            shards=written.shards,
            files=written.files,
            notices=self.plan.notices,
        )

    def _record(self, branch: Branch, written: Written) -> BranchRecord:
        source = self.sources[branch]
        of_bytes = tensor_digests(written)
        planned = {tensor.name: tensor.content for shard in self.plan.shards for tensor in shard.tensors}
        tensors = {}
        for name in source.tensors:
            out_name = to_branch_name(name, branch) if is_dense_ffn(name) else name
            content = planned[out_name]
            tensors[name] = (content.dtype, content.shape, of_bytes[out_name])
        foreign = bool(self.differences) and self.options.shared_from != branch.label
        return BranchRecord(
            source=source.name,
            revision=source.revision,
            adapter=source.adapter.path.name if source.adapter else None,
            exact=self.options.dtype == "keep" and source.adapter is None and not foreign,
            digest=branch_digest(tensors),
            files=self.small.origins[branch],
            headers=self.small.headers[branch],
        )


def package_version() -> str:
    """The version of this package, for the manifest and the card."""
    try:
        return version("metis_home")
    except PackageNotFoundError:  # a bare checkout
        return "unknown"


@contextmanager
def open_conversion(
    thinking: str | Path,
    non_thinking: str | Path | None = None,
    *,
    options: Options,
    compare: bool = True,
    progress: Progress = silent,
    base: str | Path | None = None,
) -> Iterator[Conversion]:
    """Open the sources and plan their conversion; nothing is written. The sources are open while the context is.

    Args:
        thinking: directory, hub id or hub id@revision of a dense model or of a LoRA adapter; becomes branch 1 and,
            unless `options.shared_from` says otherwise, the shared part.
        non_thinking: the same for branch 0; None means `thinking`.
        options: see `Options`.
        compare: read the shared weights of two sources and compare them.
        progress: called after each piece.
        base: dense model under an adapter, where it is not the one that the adapter names.
    Raises:
        CheckpointError: a source cannot be used, or the two do not agree.
    """
    with ExitStack() as stack:
        one = stack.enter_context(open_source(thinking, base=base, progress=progress))
        same = non_thinking is None or _same_place(thinking, non_thinking)
        other = one if same else stack.enter_context(open_source(non_thinking or "", base=base, progress=progress))
        differences: list[SharedDifference] = []
        if other is not one:
            check_same_shape(one, other)
            if compare:
                differences = compare_shared(one, other, progress)
        if differences and not options.allow_shared_mismatch:
            refuse_differences(differences, len(one.shared_names()), one.name, other.name)
        yield _plan(one, other, options, differences)


def upcycle(
    thinking: str | Path,
    out_dir: str | Path,
    non_thinking: str | Path | None = None,
    *,
    dtype: DtypeOption = "keep",
    max_shard_size: str | int = "5GB",
    seed: int = DEFAULT_SEED,
    resume: bool = False,
    overwrite: bool = False,
    allow_shared_mismatch: bool = False,
    shared_from: SharedFrom = "thinking",
    router_hidden_size: int | None = None,
    router_pooling: str | None = None,
    base: str | Path | None = None,
    progress: Progress = silent,
    disk: Disk | None = None,
) -> Manifest:
    """Make a two-branch checkpoint at `out_dir` from one or two dense ones.

    Every weight is copied byte for byte (unless `dtype` asks for a cast); the router is new and untrained. The result
    appears by rename when it is complete and on the disk.

    Args:
        thinking: directory or hub id (`org/name` or `org/name@revision`) of a dense Qwen2.5-VL, or of a LoRA adapter of
            one; becomes branch 1.
        out_dir: directory to make; its parent must exist.
        non_thinking: likewise, becomes branch 0; None: both branches begin equal.
        dtype: `keep`, or cast all weights but the router's.
        max_shard_size: bytes of tensors per file, a number or such as `5GB`, `512MiB`.
        seed: of the router's random numbers.
        resume: continue what a stopped run left in `OUT.partial`.
        overwrite: replace a checkpoint that is at `out_dir`.
        allow_shared_mismatch: go on where the two sources differ outside their FFNs.
        shared_from: whose shared weights are kept then: `thinking`, `non-thinking`, or their `average`.
        router_hidden_size, router_pooling: of the new router.
        base: the dense model under an adapter, where it is not the one the adapter names.
        progress: called with (what, bytes done, bytes in all).
        disk: the file system; for tests.
    Returns:
        The manifest that is also in `out_dir`.
    Raises:
        CheckpointError: a source is damaged, of another architecture, or does not agree with the other.
        OutputError: `out_dir` cannot be written.
    """
    router = {"router_hidden_size": router_hidden_size, "router_pooling": router_pooling}
    options = Options(
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
        seed=seed,
        allow_shared_mismatch=allow_shared_mismatch,
        shared_from=shared_from,
        **{name: value for name, value in router.items() if value is not None},  # type: ignore[arg-type]
    )
    out = Path(out_dir)
    check_target(out, overwrite=overwrite, resume=resume)
    with open_conversion(thinking, non_thinking, options=options, progress=progress, base=base) as conversion:
        check_apart(out, *(source.path for source in conversion.sources.values()))
        write_output(
            conversion.plan,
            out,
            conversion.late_files,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            disk=disk or Disk(),
        )
    return Manifest.read(out)


def check_apart(out: Path, *sources: Path) -> None:
    """Raise CheckpointError when the output would lie in a source, or a source in the output."""
    target = out.parent.resolve() / out.name
    for source in sources:
        root = source.resolve()
        if target.is_relative_to(root) or root.is_relative_to(target):
            raise CheckpointError(
                f"the output {out} and the source {source} lie in one another. Choose another output."
            )


def _plan(
    thinking: DenseSource, non_thinking: DenseSource, options: Options, differences: list[SharedDifference]
) -> Conversion:
    cast = None if options.dtype == "keep" else DTYPE_NAMES[options.dtype]
    router: dict[str, object] = {
        "router_hidden_size": options.router_hidden_size,
        "router_pooling": options.router_pooling,
    }
    small = plan_small_files(
        thinking,
        non_thinking,
        dtype=CONFIG_NAMES[cast] if cast else None,
        router=dict(router),  # type: ignore[arg-type]
    )
    tensors = [
        (name, _cast(name, content, cast))
        for name, content in _two_branch_tensors(
            thinking, non_thinking, options, {difference.name for difference in differences}
        )
    ]
    fresh = router_tensors(thinking.shape.hidden_size, options.router_hidden_size, options.router_pooling)
    tensors += [(ROUTER_PREFIX + name, Fresh(name=name, init=init, seed=options.seed)) for name, init in fresh.items()]
    shards = lay_out(tensors, options.max_shard_bytes)
    sources = {Branch.THINKING: thinking, Branch.NON_THINKING: non_thinking}
    opened = [source.checkpoint for source in (thinking, non_thinking)]
    opened += [source.adapter for source in (thinking, non_thinking) if source.adapter]
    identities = [file_identities(checkpoint.shards.values()) for checkpoint in opened]
    parts = ["two-branch", package_version(), options.to_json(), identities]
    plan = Plan(
        kind="two-branch",
        shards=shards,
        files=tuple(small.files),
        fingerprint=fingerprint(parts, shards, small.files),  # type: ignore[arg-type]
        notices=tuple(small.notices),
    )
    return Conversion(sources=sources, options=options, small=small, differences=differences, plan=plan)


def _two_branch_tensors(
    thinking: DenseSource, non_thinking: DenseSource, options: Options, differing: set[str]
) -> Iterator[tuple[str, Content]]:
    for name, content in thinking.tensors.items():
        if is_dense_ffn(name):
            yield to_branch_name(name, Branch.NON_THINKING), non_thinking.tensors[name]
            yield to_branch_name(name, Branch.THINKING), content
        elif name in differing and options.shared_from == "average":
            yield name, Average(content, non_thinking.tensors[name])
        elif name in differing and options.shared_from == "non-thinking":
            yield name, non_thinking.tensors[name]
        else:
            yield name, content


def _cast(name: str, content: Content, dtype: str | None) -> Content:
    return content if dtype is None or content.dtype == dtype else Cast(name=name, inner=content, dtype=dtype)


def _same_place(one: str | Path, other: str | Path) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(Path(other))
