"""The router in two launches: pool, then decide. Float32 sums in a fixed order, no atomics.

    mean        1. one program per (sequence, block of D): the block's mean over the prompt tokens, and what it adds to
                   the hidden layer and to |pooled|^2            2. one program per sequence: add the blocks, decide
    attention   1. one program per (sequence, chunk of T): scores, and the chunk's softmax-weighted sum
                2. one program per sequence: merge the chunks, then the whole MLP, decide

With mean pooling each block of D is complete after the first launch, and the hidden layer is linear up to the RMS
factor, so the 3.7 MB of hidden weights are read by all programs together; with attention every score needs all of D
first, and one program per sequence reads them alone.

Definition: `reference_route.py`. Shapes: B batch, T tokens, D hidden, H router hidden, C chunks or blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference_route import ROUTER_EPS, Pooled, RouterWeights
from .silu_mul import wide_type

_BLOCK_T = 32
_BLOCK_D = 64
_CHUNK_T = 128
_TOKENS = 8
_MLP_D = 32


@triton.jit
def _decide(hidden, output_ptr, output_bias_ptr, b, branch_ptr, probability_ptr, logits_ptr, H, BLOCK_H: tl.constexpr):
    """Logits, probability and branch of sequence `b` from its pre-activations `hidden` (BLOCK_H, 0 beyond H)."""
    h = tl.arange(0, BLOCK_H)
    value = hidden * tl.sigmoid(hidden)
    non_thinking = tl.load(output_ptr + h, mask=h < H, other=0.0).to(hidden.dtype)
    thinking = tl.load(output_ptr + H + h, mask=h < H, other=0.0).to(hidden.dtype)
    logit_0 = tl.sum(value * non_thinking, 0) + tl.load(output_bias_ptr).to(hidden.dtype)
    logit_1 = tl.sum(value * thinking, 0) + tl.load(output_bias_ptr + 1).to(hidden.dtype)
    probability = tl.sigmoid(logit_1 - logit_0)
    tl.store(logits_ptr + 2 * b, logit_0)
    tl.store(logits_ptr + 2 * b + 1, logit_1)
    tl.store(probability_ptr + b, probability)
    tl.store(branch_ptr + b, (probability >= 0.5).to(tl.int64))


@triton.jit
def _mean_pool_kernel(
    x_ptr,
    mask_ptr,
    norm_ptr,
    hidden_ptr,
    pooled_ptr,
    partial_ptr,
    square_ptr,
    peak_ptr,
    total_ptr,
    T,
    H,
    x_stride_b,
    x_stride_t,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0)
    block = tl.program_id(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=WIDE)
    count = tl.zeros((BLOCK_T,), dtype=WIDE)
    for start in tl.range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        prompt = tl.load(mask_ptr + b.to(tl.int64) * T + t, mask=t < T, other=0) != 0
        # int64: B * T * D passes 2**31 at 599,187 tokens (D = 3584)
        at = b.to(tl.int64) * x_stride_b + t.to(tl.int64)[:, None] * x_stride_t + d[None, :]
        # Tokens outside the mask are not read at all: they may hold NaN.
        total += tl.load(x_ptr + at, mask=prompt[:, None] & (d < D)[None, :], other=0.0).to(WIDE)
        count += prompt.to(WIDE)
    tokens = tl.maximum(tl.sum(count, 0), 1.0)
    pooled = tl.sum(total, 0) / tokens
    tl.store(pooled_ptr + b.to(tl.int64) * D + d, pooled, mask=d < D)
    tl.store(total_ptr + b, tokens)
    tl.store(peak_ptr + b, 0.0)  # all scores are 0
    weighted = pooled * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(WIDE)
    weights = tl.load(hidden_ptr + h[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
    num_blocks = tl.num_programs(1)
    part = b.to(tl.int64) * num_blocks + block
    tl.store(partial_ptr + part * H + h, tl.sum(weights.to(WIDE) * weighted[None, :], 1), mask=h < H)
    tl.store(square_ptr + part, tl.sum(pooled * pooled, 0))


@triton.jit
def _mean_decide_kernel(
    partial_ptr,
    square_ptr,
    hidden_bias_ptr,
    output_ptr,
    output_bias_ptr,
    branch_ptr,
    probability_ptr,
    logits_ptr,
    num_blocks,
    H,
    EPS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    first = b.to(tl.int64) * num_blocks
    hidden = tl.zeros((BLOCK_H,), dtype=WIDE)
    square = tl.zeros((1,), dtype=WIDE)
    for block in range(num_blocks):
        hidden += tl.load(partial_ptr + (first + block) * H + h, mask=h < H, other=0.0)
        square += tl.load(square_ptr + first + block)
    bias = tl.load(hidden_bias_ptr + h, mask=h < H, other=0.0).to(WIDE)
    hidden = hidden / tl.sqrt(square / D + EPS) + bias
    _decide(hidden, output_ptr, output_bias_ptr, b, branch_ptr, probability_ptr, logits_ptr, H, BLOCK_H)


@triton.jit
def token_scores(
    x_ptr, query_ptr, at_b, t, prompt, x_stride_t, EPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(s_t, rms_t) of TOKENS tokens; tokens outside `prompt` are not read."""
    along = tl.zeros((TOKENS, BLOCK_D), dtype=WIDE)
    square = tl.zeros((TOKENS, BLOCK_D), dtype=WIDE)
    for start in tl.range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at = at_b + t.to(tl.int64)[:, None] * x_stride_t + d[None, :]
        x = tl.load(x_ptr + at, mask=prompt[:, None] & (d < D)[None, :], other=0.0).to(WIDE)
        along += x * tl.load(query_ptr + d, mask=d < D, other=0.0).to(WIDE)[None, :]
        square += x * x
    rms = tl.sqrt(tl.sum(square, 1) / D + EPS)
    return tl.sum(along, 1) / rms / tl.sqrt(tl.full((), D, WIDE)), rms


@triton.jit
def _attention_pool_kernel(
    x_ptr,
    mask_ptr,
    query_ptr,
    partial_ptr,
    peak_ptr,
    total_ptr,
    T,
    x_stride_b,
    x_stride_t,
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
    at_b = b.to(tl.int64) * x_stride_b
    peak = tl.full((), float("-inf"), WIDE)
    total = tl.zeros((), dtype=WIDE)
    pooled = tl.zeros((ALL_D,), dtype=WIDE)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = t < tl.minimum(chunk * CHUNK + CHUNK, T)
        prompt = tl.load(mask_ptr + b.to(tl.int64) * T + t, mask=inside, other=0) != 0
        score, _ = token_scores(x_ptr, query_ptr, at_b, t, prompt, x_stride_t, EPS, D, WIDE, TOKENS, BLOCK_D)
        score = tl.where(prompt, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        # A chunk that has seen no prompt token yet has the peak -inf: -inf - -inf would be NaN.
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp(score - safe_peak)
        scale = tl.exp(peak - safe_peak)
        at = at_b + t.to(tl.int64)[:, None] * x_stride_t + d[None, :]
        x = tl.load(x_ptr + at, mask=prompt[:, None] & (d < D)[None, :], other=0.0).to(WIDE)
        pooled = pooled * scale + tl.sum(weight[:, None] * x, 0)
        total = total * scale + tl.sum(weight, 0)
        peak = new_peak
    part = b.to(tl.int64) * tl.num_programs(1) + chunk
    tl.store(partial_ptr + part * D + d, pooled, mask=d < D)
    tl.store(peak_ptr + part, peak)
    tl.store(total_ptr + part, total)


@triton.jit
def _attention_decide_kernel(
    partial_ptr,
    chunk_peak_ptr,
    chunk_total_ptr,
    norm_ptr,
    hidden_ptr,
    hidden_bias_ptr,
    output_ptr,
    output_bias_ptr,
    pooled_ptr,
    peak_ptr,
    total_ptr,
    branch_ptr,
    probability_ptr,
    logits_ptr,
    num_chunks,
    H,
    EPS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    first = b.to(tl.int64) * num_chunks
    peak = tl.full((), float("-inf"), WIDE)
    for chunk in range(num_chunks):
        peak = tl.maximum(peak, tl.load(chunk_peak_ptr + first + chunk))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((), dtype=WIDE)
    for chunk in range(num_chunks):
        total += tl.load(chunk_total_ptr + first + chunk) * tl.exp(tl.load(chunk_peak_ptr + first + chunk) - peak)
    total = tl.where(total > 0, total, 1.0)
    tl.store(peak_ptr + b, peak)
    tl.store(total_ptr + b, total)

    hidden = tl.zeros((BLOCK_H,), dtype=WIDE)
    square = tl.zeros((BLOCK_D,), dtype=WIDE)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        pooled = tl.zeros((BLOCK_D,), dtype=WIDE)
        for chunk in range(num_chunks):
            scale = tl.exp(tl.load(chunk_peak_ptr + first + chunk) - peak)
            pooled += tl.load(partial_ptr + (first + chunk) * D + d, mask=d < D, other=0.0) * scale
        pooled = pooled / total
        tl.store(pooled_ptr + b.to(tl.int64) * D + d, pooled, mask=d < D)
        square += pooled * pooled
        weighted = pooled * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(WIDE)
        weights = tl.load(hidden_ptr + h[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
        hidden += tl.sum(weights.to(WIDE) * weighted[None, :], 1)
    bias = tl.load(hidden_bias_ptr + h, mask=h < H, other=0.0).to(WIDE)
    hidden = hidden / tl.sqrt(tl.sum(square, 0) / D + EPS) + bias
    _decide(hidden, output_ptr, output_bias_ptr, b, branch_ptr, probability_ptr, logits_ptr, H, BLOCK_H)


def route_queries(x_BTD: Tensor, mask_BT: Tensor, weights: RouterWeights) -> tuple[Tensor, Tensor, Tensor, Pooled]:
    """Decide on each query in two launches; same results as `reference_route.route_queries`.

    Args:
        x_BTD: last dimension contiguous, B >= 1. mask_BT: bool, contiguous.
    """
    batch, tokens, width = x_BTD.shape
    router_width = weights.hidden_HD.shape[0]
    wide = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32

    def new(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_BTD.device)

    branch_ids_B, probability_B, logits_BE = new(batch, dtype=torch.long), new(batch), new(batch, 2)
    pooled_BD, peak_B, total_B = new(batch, width), new(batch), new(batch)
    decision = (branch_ids_B, probability_B, logits_BE)
    block_h = triton.next_power_of_2(router_width)
    if weights.query_D is None:
        blocks = triton.cdiv(width, _BLOCK_D)
        partial, square = new(batch, blocks, router_width), new(batch, blocks)
        _mean_pool_kernel[(batch, blocks)](
            x_BTD, mask_BT, weights.norm_D, weights.hidden_HD, pooled_BD, partial, square, peak_B, total_B, tokens,
            router_width, x_BTD.stride(0), x_BTD.stride(1), D=width, WIDE=wide_type(wide), BLOCK_T=_BLOCK_T,
            BLOCK_D=_BLOCK_D, BLOCK_H=block_h, num_warps=8,
        )  # fmt: skip
        _mean_decide_kernel[(batch,)](
            partial, square, weights.hidden_bias_H, weights.output_EH, weights.output_bias_E, *decision, blocks,
            router_width, EPS=ROUTER_EPS, D=width, WIDE=wide_type(wide), BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
        return *decision, Pooled(pooled_BD, peak_B, total_B)

    chunks = max(1, triton.cdiv(tokens, _CHUNK_T))
    partial, chunk_peak, chunk_total = new(batch, chunks, width), new(batch, chunks), new(batch, chunks)
    _attention_pool_kernel[(batch, chunks)](
        x_BTD, mask_BT, weights.query_D, partial, chunk_peak, chunk_total, tokens, x_BTD.stride(0), x_BTD.stride(1),
        EPS=ROUTER_EPS, D=width, WIDE=wide_type(wide), CHUNK=_CHUNK_T, TOKENS=_TOKENS, BLOCK_D=128,
        ALL_D=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    _attention_decide_kernel[(batch,)](
        partial, chunk_peak, chunk_total, weights.norm_D, weights.hidden_HD, weights.hidden_bias_H, weights.output_EH,
        weights.output_bias_E, pooled_BD, peak_B, total_B, *decision, chunks, router_width, EPS=ROUTER_EPS, D=width,
        WIDE=wide_type(wide), BLOCK_D=_MLP_D, BLOCK_H=block_h, num_warps=8,
    )  # fmt: skip
    return *decision, Pooled(pooled_BD, peak_B, total_B)
