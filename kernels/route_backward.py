"""The token side of the router's backward in one launch: dX, and each chunk's part of the query's gradient.

A token's weight is rebuilt from the kept peak and total, and the softmax's sum over tokens is dp . pooled, which is
known: so every token is on its own, and one pass over x suffices. Definition: `reference_route.pool_backward`.

Shapes: B batch, T tokens, D hidden, C chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import narrow
from .reference_route import ROUTER_EPS, Pooled
from .route import token_scores
from .silu_mul import wide_type

_CHUNK_T = 64
_TOKENS = 4


@triton.jit
def _pool_backward_kernel(
    grad_pooled_ptr,
    pooled_ptr,
    x_ptr,
    mask_ptr,
    query_ptr,
    peak_ptr,
    total_ptr,
    grad_x_ptr,
    grad_query_ptr,
    T,
    x_stride_b,
    x_stride_t,
    ATTENTION: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_D: tl.constexpr,
):
    b = tl.program_id(0)
    chunk = tl.program_id(1)
    d = tl.arange(0, ALL_D)
    in_d = d < D
    at_b = b.to(tl.int64) * x_stride_b
    grad_pooled = tl.load(grad_pooled_ptr + b.to(tl.int64) * D + d, mask=in_d, other=0.0)
    total = tl.load(total_ptr + b)
    element: tl.constexpr = grad_x_ptr.dtype.element_ty
    if ATTENTION:
        pooled = tl.load(pooled_ptr + b.to(tl.int64) * D + d, mask=in_d, other=0.0)
        along_pooled = tl.sum(grad_pooled * pooled, 0)
        query = tl.load(query_ptr + d, mask=in_d, other=0.0).to(WIDE)
        peak = tl.load(peak_ptr + b)
        root = tl.sqrt(tl.full((), D, WIDE))
        grad_query = tl.zeros((ALL_D,), dtype=WIDE)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = t < tl.minimum(chunk * CHUNK + CHUNK, T)
        prompt = tl.load(mask_ptr + b.to(tl.int64) * T + t, mask=inside, other=0) != 0
        if ATTENTION:
            score, rms = token_scores(x_ptr, query_ptr, at_b, t, prompt, x_stride_t, EPS, D, WIDE, TOKENS, BLOCK_D)
            weight = tl.where(prompt, tl.exp(score - peak) / total, 0.0)
            at = at_b + t.to(tl.int64)[:, None] * x_stride_t + d[None, :]
            x = tl.load(x_ptr + at, mask=prompt[:, None] & in_d[None, :], other=0.0).to(WIDE)
            grad_score = weight * (tl.sum(grad_pooled[None, :] * x, 1) - along_pooled)
            scaled = grad_score / (rms * root)
            # (x . query) / (D rms^2), where x . query = score * rms * sqrt(D)
            pull = score / (root * rms)
            grad_x = weight[:, None] * grad_pooled[None, :]
            grad_x += scaled[:, None] * (query[None, :] - pull[:, None] * x)
            grad_query += tl.sum(scaled[:, None] * x, 0)
        else:
            grad_x = tl.where(prompt, 1.0 / total, 0.0)[:, None] * grad_pooled[None, :]
        out = (b.to(tl.int64) * T + t)[:, None] * D + d[None, :]
        tl.store(grad_x_ptr + out, narrow(grad_x, element), mask=inside[:, None] & in_d[None, :])
    if ATTENTION:
        part = b.to(tl.int64) * tl.num_programs(1) + chunk
        tl.store(grad_query_ptr + part * D + d, grad_query, mask=in_d)


def pool_backward(
    grad_pooled_BD: Tensor, x_BTD: Tensor, mask_BT: Tensor, query_D: Tensor | None, pooled: Pooled
) -> tuple[Tensor, Tensor | None]:
    """(dx (B, T, D), dtype of x, 0 outside the mask; dquery (D,) or None with mean pooling)."""
    batch, tokens, width = x_BTD.shape
    wide = grad_pooled_BD.dtype
    chunks = triton.cdiv(tokens, _CHUNK_T)
    grad_x_BTD = torch.empty((batch, tokens, width), dtype=x_BTD.dtype, device=x_BTD.device)
    grad_query_BCD = grad_pooled_BD if query_D is None else grad_pooled_BD.new_empty(batch, chunks, width)
    _pool_backward_kernel[(batch, chunks)](
        grad_pooled_BD.contiguous(), pooled.pooled_BD, x_BTD, mask_BT, grad_pooled_BD if query_D is None else query_D,
        pooled.peak_B, pooled.total_B, grad_x_BTD, grad_query_BCD, tokens, x_BTD.stride(0), x_BTD.stride(1),
        ATTENTION=query_D is not None, EPS=ROUTER_EPS, D=width, WIDE=wide_type(wide), CHUNK=_CHUNK_T, TOKENS=_TOKENS,
        BLOCK_D=128, ALL_D=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    # torch's sum adds in a fixed order: the same bits in every run.
    return grad_x_BTD, None if query_D is None else grad_query_BCD.sum((0, 1))
