"""The one place that knows whether the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`, on a CPU).

Triton decides when it decorates a function, so the variable has to be set before the first kernel is imported; reading
it here, at import, gives the same answer as the decorator.
"""

import triton
import triton.language as tl

INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

_UPCAST = tl.constexpr(INTERPRETING)
_ROUND = tl.constexpr(INTERPRETING)


@triton.jit
def dot(left, right, total):
    """total + left @ right, exact products, summed in the dtype of `total`.

    The interpreter multiplies the raw bits of bfloat16 operands (relative error about 1e21, Triton 3.6 to 3.9), so
    there they are widened first. `ieee`: float32 operands must not be cut to tf32.
    """
    if _UPCAST:
        left = left.to(total.dtype)
        right = right.to(total.dtype)
    return tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def narrow(value, element: tl.constexpr):
    """`value` in the dtype `element`, rounded to nearest even.

    The interpreter cuts float32 to bfloat16 towards zero (3.6 to 3.9), which doubles the error that a chip would make;
    there the value is rounded first.
    """
    if _ROUND:
        if element == tl.bfloat16:
            bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
            value = tl.where(value == value, rounded, value)  # a NaN stays one
    return value.to(element)
