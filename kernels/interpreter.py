"""The one place that knows whether the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`, on a CPU).

Triton decides when it decorates a function, so the variable has to be set before the first kernel is imported; reading
it here, at import, gives the same answer as the decorator.
"""

import triton
import triton.language as tl

INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

_UPCAST = tl.constexpr(INTERPRETING)


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
