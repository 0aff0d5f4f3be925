"""The activation and its backward, one pass over memory each: `silu_mul`, `dswiglu`. See their twins in `reference.py`.

Element-wise over (N, F) in blocks of rows and columns. Memory per element: 3 and 6 values moved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import narrow

_BLOCK = 1024


@triton.jit
def swiglu_gradient(grad_a, gate, up):
    """(dgate, dup, a) in the dtype of the arguments, float32 or float64."""
    s = tl.sigmoid(gate)
    silu = gate * s
    return grad_a * up * s * (1 + gate * (1 - s)), grad_a * silu, silu * up


@triton.jit
def _silu_mul_kernel(
    gate_ptr, up_ptr, a_ptr, num_features, gate_stride, up_stride, a_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    # int64: N * F passes 2**31 at 113,360 rows (F = 18944)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_features
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(WIDE)
    a = gate * tl.sigmoid(gate) * up
    tl.store(a_ptr + row * a_stride + columns, narrow(a, a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dswiglu_kernel(
    grad_a_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    a_ptr,
    num_features,
    grad_a_stride,
    gate_stride,
    up_stride,
    out_stride,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_features
    grad_a = tl.load(grad_a_ptr + row * grad_a_stride + columns, mask=mask, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(WIDE)
    grad_gate, grad_up, a = swiglu_gradient(grad_a, gate, up)
    out = row * out_stride + columns
    element = a_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + out, narrow(grad_gate, element), mask=mask)
    tl.store(grad_up_ptr + out, narrow(grad_up, element), mask=mask)
    tl.store(a_ptr + out, narrow(a, element), mask=mask)


def wide_type(dtype: torch.dtype) -> tl.dtype:
    """What a kernel sums in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _grid(rows_NF: Tensor) -> tuple[int, int]:
    # Rows on the first axis: it may have 2**31 - 1 programs, the others 65,535.
    return rows_NF.shape[0], triton.cdiv(rows_NF.shape[1], _BLOCK)


def silu_mul(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """a = silu(gate) * up, rounded once; (N, F), last dimension contiguous. One launch, none for zero elements."""
    a_NF = torch.empty(gate_NF.shape, dtype=gate_NF.dtype, device=gate_NF.device)
    if a_NF.numel():
        _silu_mul_kernel[_grid(gate_NF)](
            gate_NF,
            up_NF,
            a_NF,
            gate_NF.shape[1],
            gate_NF.stride(0),
            up_NF.stride(0),
            a_NF.stride(0),
            BLOCK=_BLOCK,
            WIDE=wide_type(gate_NF.dtype),
        )
    return a_NF


def dswiglu(grad_a_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, a) in one pass; (N, F), last dimension contiguous."""
    grad_gate_NF, grad_up_NF, a_NF = (
        torch.empty(gate_NF.shape, dtype=gate_NF.dtype, device=gate_NF.device) for _ in range(3)
    )
    if a_NF.numel():
        _dswiglu_kernel[_grid(gate_NF)](
            grad_a_NF,
            gate_NF,
            up_NF,
            grad_gate_NF,
            grad_up_NF,
            a_NF,
            gate_NF.shape[1],
            grad_a_NF.stride(0),
            gate_NF.stride(0),
            up_NF.stride(0),
            a_NF.stride(0),
            BLOCK=_BLOCK,
            WIDE=wide_type(gate_NF.dtype),
        )
    return grad_gate_NF, grad_up_NF, a_NF
