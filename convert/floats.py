"""Numbers between bf16, fp16 and fp32, in numpy and without torch. Rounds to nearest, ties to even, as torch does."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
DTYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_BF16_SMALLEST_NORMAL = 0x3880  # 2**-14, the smallest normal fp16 number, as bf16
_BF16_BEYOND_FP16 = 0x4780  # 65536
CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def to_float32(data: bytes | memoryview, dtype: str) -> "NDArray[np.float32]":
    """Exact: every bf16 and fp16 number is a float32 number."""
    import numpy as np

    if dtype == "F32":
        return np.frombuffer(data, np.float32)
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    bits = np.frombuffer(data, np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


@cache
def narrow_table(source: str, dtype: str) -> "NDArray[np.uint16]":
    """The bits in `dtype` of each of the 65,536 numbers of the 16-bit type `source`: 128 KiB, a look-up per number."""
    import numpy as np

    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    return from_float32(to_float32(every.tobytes(), source), dtype).view(np.uint16)


def bf16_to_fp16(bits: "NDArray[np.uint16]") -> "NDArray[np.uint16]":
    """The bits of fp16 numbers from those of bf16 numbers, rounded as by `from_float32`.

    In fp16's normal range the conversion is exact, since bf16 has fewer mantissa bits: move the exponent's bias (127 to
    15) and shift. Smaller and larger numbers, a few in a thousand weights, go through the table.
    """
    import numpy as np

    magnitude = bits & np.uint16(0x7FFF)
    outside = magnitude - np.uint16(_BF16_SMALLEST_NORMAL) >= _BF16_BEYOND_FP16 - _BF16_SMALLEST_NORMAL  # wraps below
    magnitude -= np.uint16((127 - 15) << 7)
    magnitude <<= 3
    magnitude |= bits & np.uint16(0x8000)
    where = np.flatnonzero(outside)
    if len(where):
        magnitude[where] = narrow_table("BF16", "F16")[bits[where]]
    return magnitude


def from_float32(values: "NDArray[np.float32]", dtype: str) -> "NDArray[np.generic]":
    """Round to `dtype`; a new array whose bytes are the numbers. NaN stays NaN; what is too large becomes infinite."""
    import numpy as np

    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    # bf16 is the upper half of the bits. Adding 0x7FFF, and 1 more when the lowest bit that stays is odd, carries into
    # it exactly when the rest is above one half, or is one half and the bit is odd.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    not_a_number = np.isnan(values)
    if not_a_number.any():  # the carry could turn NaN into infinity
        result[not_a_number] = 0x7FC0
    return result
