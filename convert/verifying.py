"""Is a two-branch checkpoint what it should be? By digest, against its sources, or by the logits it computes."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..branch import Branch
from ..errors import CheckpointError, VerificationError
from ..link_bundle import is_bundle
from .checkpoint import StoredTensor
from .contents import Average, Cast, Content
from .dense import DenseSource
from .floats import DTYPE_NAMES, to_float32
from .header import DTYPE_BITS
from .options import Options
from .sources import open_source
from .two_branch import TwoBranchSource, open_two_branch, two_branch_name
from .upcycling import silent
from .writing import Progress, digest_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found to be right."""

    tensors: int
    """Tensors with the right name, shape and type."""
    digested_bytes: int
    """Bytes of shards and small files whose digests are those of the manifest; 0 without a manifest."""
    compared: dict[str, int]
    """{branch: tensors that equal the source's}, for each source that was given."""
    not_compared: dict[str, int]
    """{branch: shared tensors that were knowingly taken from the other source}."""
    logits: dict[str, float]
    """{branch: largest difference of logits to the dense source}; 0.0 where both are one computation."""


def verify(
    two_branch_dir: str | Path,
    thinking: str | Path | None = None,
    non_thinking: str | Path | None = None,
    *,
    logits: bool = False,
    base: str | Path | None = None,
    progress: Progress = silent,
) -> Verification:
    """Check a two-branch checkpoint; raises on the first difference.

    Always: every tensor is there, once, with the shape that the config gives it. With a manifest: every file has its
    digest. With sources: each tensor of the branch equals the source's, bit for bit, after the cast or average that the
    manifest says was asked for.

    Args:
        two_branch_dir: what `upcycle` made.
        thinking, non_thinking: the sources; directories, hub ids, adapters.
        logits: load the models and compare what they compute on a fixed prompt with an image. Needs torch, memory for
            one model at a time, and a source.
        base: dense model under an adapter.
        progress: called after each piece.
    Raises:
        VerificationError: a difference; the message names file or tensor.
        CheckpointError: something cannot be read at all.
    """
    directory = Path(two_branch_dir)
    if is_bundle(directory):
        raise CheckpointError(
            f"{directory} is a link bundle: its branches are the sources themselves, nothing to verify."
        )
    given = {Branch.THINKING: thinking, Branch.NON_THINKING: non_thinking}
    if logits and not any(given.values()):
        raise CheckpointError("comparing logits needs a dense source: give --thinking, --non-thinking or both.")
    with ExitStack() as stack:
        model = open_two_branch(directory)
        stack.callback(model.checkpoint.close)
        digested = _check_digests(model, progress)
        sources = {
            branch: stack.enter_context(open_source(where, base=base, progress=progress))
            for branch, where in given.items()
            if where is not None
        }
        compared, not_compared = {}, {}
        for branch in sources:
            compared[branch.label], not_compared[branch.label] = _compare(model, branch, sources, progress)
        paths = {branch: source.path for branch, source in sources.items() if source.adapter is None}
        exact = {branch: not_compared[branch.label] == 0 and _options(model).dtype == "keep" for branch in paths}
    differences: dict[str, float] = {}
    if logits:
        from .logits import compare_logits

        differences = compare_logits(directory, paths, exact)
    return Verification(
        tensors=len(model.tensors),
        digested_bytes=digested,
        compared=compared,
        not_compared=not_compared,
        logits=differences,
    )


def _check_digests(model: TwoBranchSource, progress: Progress) -> int:
    """Compare every file with the manifest; returns the bytes read."""
    if model.manifest is None:
        return 0
    shards, done = model.manifest.shards, 0
    total = sum(digest.size for digest in shards.values())
    if set(shards) != set(model.checkpoint.shards):
        raise VerificationError(
            f"{model.path}: the manifest is of the shards {sorted(shards)}, found {sorted(model.checkpoint.shards)}. "
            "Was the model saved again? Then remove metis_home_manifest.json."
        )
    for name, wanted in shards.items():
        file = model.checkpoint.shards[name]
        parts = [(t.name, t.offset, t.size) for t in model.checkpoint.tensors.values() if t.file is file]
        found = digest_of(file.fd, file.size, parts)
        if found != wanted:
            odd = next((t for t in wanted.tensors if found.tensors.get(t) != wanted.tensors[t]), "its header")
            raise VerificationError(
                f"{file.path} is not what was written: first difference in {odd}. It was damaged, or changed on "
                "purpose; convert again, or remove metis_home_manifest.json if the model was trained."
            )
        done += found.size
        progress("checking digests", done, total)
    for name, wanted in model.manifest.files.items():
        small = model.checkpoint.small_files.get(name)
        if "/" in name:
            continue  # kept originals: `split` checks what it uses
        if small is None or digest_of(small.fd, small.size) != wanted:
            raise VerificationError(
                f"{model.path / name} is not what was written. Convert again, or remove the manifest."
            )
        done += wanted.size
    return done


def _options(model: TwoBranchSource) -> Options:
    if model.manifest is None:
        return Options()
    try:
        return Options(**model.manifest.options)  # type: ignore[arg-type]
    except TypeError as error:
        raise CheckpointError(f"{model.path}: the manifest has options that this version lacks: {error}.") from None


def _compare(
    model: TwoBranchSource, branch: Branch, sources: dict[Branch, DenseSource], progress: Progress
) -> tuple[int, int]:
    """Compare a branch with its source; returns (tensors compared, tensors of the other source)."""
    source, options = sources[branch], _options(model)
    recorded = model.manifest.shared_mismatch if model.manifest is not None else []
    differing = {str(difference["name"]) for difference in recorded}
    averaged = differing if options.shared_from == "average" and len(sources) == len(Branch) else set()
    foreign = differing - averaged if options.shared_from != branch.label else set()
    total, done, compared = sum(content.size for content in source.tensors.values()), 0, 0
    for name, content in source.tensors.items():
        done += content.size
        progress(f"comparing branch {branch.label}", done, total)
        if name in foreign:
            continue
        expected = content
        if name in averaged:
            expected = Average(sources[Branch.THINKING].tensors[name], sources[Branch.NON_THINKING].tensors[name])
        if options.dtype != "keep" and expected.dtype != DTYPE_NAMES[options.dtype]:
            expected = Cast(name=name, inner=expected, dtype=DTYPE_NAMES[options.dtype])
        stored = model.tensors.get(two_branch_name(name, branch))
        if stored is None:
            raise VerificationError(f"{model.path} has no tensor {two_branch_name(name, branch)!r}.")
        _check_equal(stored, expected, branch, source)
        compared += 1
    return compared, len(foreign)


def _check_equal(stored: StoredTensor, expected: Content, branch: Branch, source: DenseSource) -> None:
    where = f"branch {branch.label}: {stored.name!r}"
    if (stored.dtype, stored.shape) != (expected.dtype, expected.shape):
        raise VerificationError(
            f"{where} is {stored.dtype} {list(stored.shape)}, in {source.path} it is {expected.dtype} "
            f"{list(expected.shape)}."
        )
    offset, width = 0, DTYPE_BITS[stored.dtype] // 8
    for wanted in expected.chunks():
        found = stored.file.read_range(stored.offset + offset, len(wanted))
        if found != wanted:
            first = (
                next(i for i, (a, b) in enumerate(zip(found, bytes(wanted), strict=True)) if a != b) // width * width
            )
            values = [
                float(to_float32(data[first : first + width], stored.dtype)[0]) for data in (found, bytes(wanted))
            ]
            raise VerificationError(
                f"{where}, element {(offset + first) // width} is {values[0]:g}, in {source.path} it is {values[1]:g}. "
                "The branch was trained, or was not made from this source."
            )
        offset += len(wanted)
