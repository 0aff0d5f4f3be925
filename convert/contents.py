"""What an output tensor is made of, when it is not a plain copy: streamed, never whole in memory.

Every kind has `dtype`, `shape`, `size` (bytes), `chunks()` and `identity()`, as `StoredTensor` has; so a folded LoRA
weight can be cast, and an average of casts taken, without any of them knowing the other.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import CheckpointError
from ..router_layout import TensorInit
from .floats import FLOAT_BYTES, bf16_to_fp16, from_float32, narrow_table, to_float32
from .header import tensor_bytes
from .strict_json import Json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FP16_LARGEST = 65504.0
_FP16_INFINITY = 0x7C00


class Content(Protocol):
    """The bytes of a tensor, and what they come from."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes in order, a few MiB at most at a time, each a whole number of elements."""
        ...

    def identity(self) -> list[Json]:
        """What this is made of, for the fingerprint of a plan."""
        ...


@dataclass(frozen=True, slots=True)
class Cast:
    """`inner` in another float type."""

    name: str
    inner: Content
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def size(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Raises CheckpointError where a finite number becomes infinite (fp16 ends at 65504)."""
        import numpy as np

        source = self.inner.dtype
        both_narrow = FLOAT_BYTES[source] == FLOAT_BYTES[self.dtype] == 2
        for chunk in self.inner.chunks():
            if (source, self.dtype) == ("BF16", "F16"):
                cast: np.ndarray = bf16_to_fp16(np.frombuffer(chunk, np.uint16))
            elif both_narrow:
                cast = narrow_table(source, self.dtype)[np.frombuffer(chunk, np.uint16)]
            else:
                cast = from_float32(to_float32(chunk, source), self.dtype)
            if self.dtype == "F16" and (cast.view(np.uint16) & 0x7FFF == _FP16_INFINITY).any():
                self._check_range(to_float32(chunk, source))
            yield cast.data.cast("B")

    def _check_range(self, values: "NDArray[np.float32]") -> None:
        import numpy as np

        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max()
        if largest > FP16_LARGEST:
            raise CheckpointError(
                f"{self.name!r} holds {largest:g}; fp16 ends at {FP16_LARGEST:g}. Use --dtype bf16 or fp32."
            )

    def identity(self) -> list[Json]:
        return ["cast", self.dtype, self.inner.identity()]


@dataclass(frozen=True, slots=True)
class Average:
    """The mean of two tensors of equal shape, computed in float32, in the type of the first."""

    first: Content
    second: Content

    @property
    def dtype(self) -> str:
        return self.first.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def size(self) -> int:
        return self.first.size

    def chunks(self) -> Iterator[bytes | memoryview]:
        for one, other in paired_floats(self.first, self.second):
            # halves first: the sum of two large numbers could overflow
            mean = one * 0.5
            mean += other * 0.5
            yield from_float32(mean, self.dtype).data.cast("B")

    def identity(self) -> list[Json]:
        return ["average", self.first.identity(), self.second.identity()]


@dataclass(frozen=True, slots=True)
class Fresh:
    """A tensor of a new router: normal numbers or a constant, float32, the same for the same seed everywhere."""

    name: str
    init: TensorInit
    seed: int
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.init.shape

    @property
    def size(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def chunks(self) -> Iterator[bytes | memoryview]:
        import numpy as np

        count = self.size // 4
        if self.init.std is None:
            yield np.full(count, self.init.constant, np.float32).data.cast("B")
            return
        # numpy promises that RandomState never changes its numbers; each tensor has its own stream, so that the order
        # in which they are written does not matter.
        key = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        random = np.random.RandomState(np.frombuffer(key, np.uint32).astype(np.int64))
        for begin in range(0, count, 2**18):
            values = random.standard_normal(min(2**18, count - begin)) * self.init.std
            yield values.astype(np.float32).data.cast("B")

    def identity(self) -> list[Json]:
        return ["fresh", self.name, self.seed, self.init.std, self.init.constant]


def paired_floats(first: Content, second: Content) -> Iterator[tuple["NDArray[np.float32]", "NDArray[np.float32]"]]:
    """The numbers of two tensors side by side as float32, in pieces of equal length."""
    ones, others = _floats(first), _floats(second)
    one = other = None
    while True:
        one = next(ones, None) if one is None or not len(one) else one
        other = next(others, None) if other is None or not len(other) else other
        if one is None or other is None:
            if one is not None or other is not None:
                raise ValueError("the two tensors have different lengths")
            return
        count = min(len(one), len(other))
        yield one[:count], other[:count]
        one, other = one[count:], other[count:]


def _floats(content: Content) -> Iterator["NDArray[np.float32]"]:
    if content.dtype not in FLOAT_BYTES:
        raise ValueError(f"{content.dtype} is no float type that is read here")
    for chunk in content.chunks():
        yield to_float32(chunk, content.dtype)
