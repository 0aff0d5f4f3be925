"""The part that both branches share (attention, norms, embeddings, vision): do two sources agree on it?"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from ..errors import CheckpointError
from .checkpoint import StoredTensor
from .contents import Content, paired_floats
from .dense import DenseSource
from .strict_json import Json
from .writing import Progress

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class SharedDifference:
    """A shared tensor that two sources do not agree on.

    relative_norm = |thinking - non_thinking| / |thinking|, Euclidean; max_abs = the largest difference of two numbers.
    """

    name: str
    relative_norm: float
    max_abs: float
    dtypes: tuple[str, str]

    def to_json(self) -> dict[str, Json]:
        """For the manifest."""
        return {
            "name": self.name,
            "relative_norm": self.relative_norm,
            "max_abs": self.max_abs,
            "dtypes": list(self.dtypes),
        }


def check_same_shape(thinking: DenseSource, non_thinking: DenseSource) -> None:
    """Raise CheckpointError where the configs of two sources cannot be one model."""
    one, other = thinking.shape, non_thinking.shape
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    fields = {name: (getattr(one, name), getattr(other, name)) for name in (*names, "vocab_size", "tied")}
    fields |= {f"vision_config.{name}": (one.vision[name], other.vision[name]) for name in one.vision}
    fields |= {name: (one.numbers[name], other.numbers[name]) for name in one.numbers}
    for name, (found, wanted) in fields.items():
        if found != wanted:
            raise CheckpointError(
                f"the sources are different models: {name} is {found} in {thinking.path} and {wanted} in "
                f"{non_thinking.path}. Both branches share everything but the FFNs, so the configs must agree."
            )


def compare_shared(thinking: DenseSource, non_thinking: DenseSource, progress: Progress) -> list[SharedDifference]:
    """Read the shared tensors of both sources and return those that differ, the largest relative norm first."""
    names = thinking.shared_names()
    total, done = sum(thinking.tensors[name].size for name in names), 0
    differences = []
    for name in names:
        one, other = thinking.tensors[name], non_thinking.tensors[name]
        if not same_bytes(one, other):
            differences.append(_measure(name, one, other))
        done += one.size
        progress("comparing shared weights", done, total)
    return sorted(differences, key=lambda difference: -difference.relative_norm)


def same_bytes(one: Content, other: Content) -> bool:
    """Do two tensors have the same type and the same bytes?"""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        return all(a == b for a, b in zip_longest(one.chunks(), other.chunks()))
    return all(a == b for a, b in _aligned(one, other))


def refuse_differences(differences: list[SharedDifference], total: int, thinking: str, non_thinking: str) -> None:
    """Raise CheckpointError that says which shared tensors differ and by how much."""
    shown = "\n".join(
        f"  {d.name}: relative norm {d.relative_norm:.3g}, largest difference {d.max_abs:.3g}"
        + (f", {d.dtypes[0]} and {d.dtypes[1]}" if d.dtypes[0] != d.dtypes[1] else "")
        for d in differences[:_SHOWN]
    )
    more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    raise CheckpointError(
        f"{len(differences)} of {total} shared tensors differ between {thinking} (thinking) and {non_thinking} "
        f"(non-thinking):\n{shown}{more}\n"
        "Only one of them can be kept, so one branch would not be what its source was. To do it all the same: "
        "--allow-shared-mismatch, with --shared-from thinking, non-thinking or average."
    )


def _aligned(one: Content, other: Content) -> Iterator[tuple[bytes, bytes]]:
    # the float32 image of a number of one type says exactly which number it is
    for left, right in paired_floats(one, other):
        yield left.tobytes(), right.tobytes()


def _measure(name: str, one: Content, other: Content) -> SharedDifference:
    import numpy as np

    difference = norm = largest = 0.0
    for left, right in paired_floats(one, other):
        gap = left.astype(np.float64) - right
        difference += float(np.square(gap).sum())
        norm += float(np.square(left, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    relative = (difference / norm) ** 0.5 if norm else (float("inf") if difference else 0.0)
    return SharedDifference(name=name, relative_norm=relative, max_abs=largest, dtypes=(one.dtype, other.dtype))
