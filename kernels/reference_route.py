"""The router in plain PyTorch: what the router kernels must compute. Forward and hand-written backward.

    mean:       pooled = sum_t m_t x_t / max(1, sum_t m_t)
    attention:  pooled = sum_t a_t x_t,   a = softmax over m_t = 1 of s_t,   s_t = (x_t / rms(x_t)) . query / sqrt(D)
    logits     = W_output silu(W_hidden (pooled / rms(pooled) * norm) + b_hidden) + b_output
    P(thinking) = softmax(logits)[1],   branch = 1 where P >= 0.5,   rms(v) = sqrt(mean(v^2) + 1e-6)

Everything in float32 (float64 for float64 input). A row without any prompt token pools to zero; a token outside the
mask may hold anything, also NaN.

Shapes: B batch, T tokens, D hidden, H router hidden, E branches (2).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import accumulation_dtype

ROUTER_EPS = 1e-6


class RouterWeights(NamedTuple):
    """The router's parameters; `query_D` is None with mean pooling."""

    norm_D: Tensor
    hidden_HD: Tensor
    hidden_bias_H: Tensor
    output_EH: Tensor
    output_bias_E: Tensor
    query_D: Tensor | None


class Pooled(NamedTuple):
    """The pooled prompt and what the backward needs to rebuild each token's weight: exp(s_t - peak) / total."""

    pooled_BD: Tensor
    peak_B: Tensor  # max_t s_t over the mask; 0 with mean pooling or without tokens
    total_B: Tensor  # sum_t exp(s_t - peak) over the mask, at least 1; the token count with mean pooling


def scores(x_BTD: Tensor, query_D: Tensor) -> Tensor:
    """s_t, shape (B, T)."""
    rms_BT1 = torch.sqrt(x_BTD.square().mean(-1, keepdim=True) + ROUTER_EPS)
    return (x_BTD / rms_BT1) @ query_D * x_BTD.shape[-1] ** -0.5


def pool(x_BTD: Tensor, mask_BT: Tensor, query_D: Tensor | None) -> Pooled:
    """Pool the masked tokens of (B, T, D) to (B, D)."""
    wide = accumulation_dtype(x_BTD.dtype)
    x_BTD = x_BTD.to(wide).masked_fill(~mask_BT[..., None], 0.0)
    peak_B = x_BTD.new_zeros(x_BTD.shape[0])
    exp_BT = mask_BT.to(wide)
    if query_D is not None and x_BTD.shape[1]:
        score_BT = scores(x_BTD, query_D.to(wide))
        has_tokens_B = mask_BT.any(1)
        peak_B = torch.where(has_tokens_B, score_BT.masked_fill(~mask_BT, -torch.inf).amax(1), 0.0)
        exp_BT = torch.where(mask_BT, torch.exp(score_BT - peak_B[:, None]), 0.0)
    total_B = exp_BT.sum(1)
    total_B = torch.where(total_B > 0, total_B, 1.0)
    return Pooled(torch.einsum("bt,btd->bd", exp_BT / total_B[:, None], x_BTD), peak_B, total_B)


def decide(pooled_BD: Tensor, weights: RouterWeights) -> tuple[Tensor, Tensor, Tensor]:
    """(branch_ids (B,) int64, P(thinking) (B,), logits (B, 2)) of a pooled prompt."""
    wide = pooled_BD.dtype
    normed_BD = (
        pooled_BD * torch.rsqrt(pooled_BD.square().mean(-1, keepdim=True) + ROUTER_EPS) * weights.norm_D.to(wide)
    )
    pre_BH = normed_BD @ weights.hidden_HD.to(wide).T + weights.hidden_bias_H.to(wide)
    logits_BE = torch.nn.functional.silu(pre_BH) @ weights.output_EH.to(wide).T + weights.output_bias_E.to(wide)
    probability_B = torch.sigmoid(logits_BE[:, 1] - logits_BE[:, 0])  # the softmax of two
    return (probability_B >= 0.5).long(), probability_B, logits_BE


def route_queries(x_BTD: Tensor, mask_BT: Tensor, weights: RouterWeights) -> tuple[Tensor, Tensor, Tensor, Pooled]:
    """Decide on each query.

    Args:
        x_BTD: input embeddings, any float dtype. mask_BT: bool, true at prompt tokens.
    Returns:
        (branch_ids (B,) int64, P(thinking) (B,) float32, logits (B, 2) float32, the pooled prompts).
    """
    pooled = pool(x_BTD, mask_BT, weights.query_D)
    return *decide(pooled.pooled_BD, weights), pooled


def decide_backward(
    grad_logits_BE: Tensor, pooled_BD: Tensor, weights: RouterWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `decide` from that of the logits: of (pooled, norm, hidden, hidden bias, output, output bias)."""
    wide = pooled_BD.dtype
    inverse_rms_B1 = torch.rsqrt(pooled_BD.square().mean(-1, keepdim=True) + ROUTER_EPS)
    unit_BD = pooled_BD * inverse_rms_B1
    normed_BD = unit_BD * weights.norm_D.to(wide)
    pre_BH = normed_BD @ weights.hidden_HD.to(wide).T + weights.hidden_bias_H.to(wide)
    sigmoid_BH = torch.sigmoid(pre_BH)

    grad_hidden_BH = grad_logits_BE @ weights.output_EH.to(wide)
    grad_pre_BH = grad_hidden_BH * sigmoid_BH * (1 + pre_BH * (1 - sigmoid_BH))
    grad_normed_BD = grad_pre_BH @ weights.hidden_HD.to(wide)
    grad_unit_BD = grad_normed_BD * weights.norm_D.to(wide)
    along_B1 = (grad_unit_BD * unit_BD).mean(-1, keepdim=True)
    return (
        inverse_rms_B1 * (grad_unit_BD - unit_BD * along_B1),
        (grad_normed_BD * unit_BD).sum(0),
        grad_pre_BH.T @ normed_BD,
        grad_pre_BH.sum(0),
        grad_logits_BE.T @ (pre_BH * sigmoid_BH),
        grad_logits_BE.sum(0),
    )


def pool_backward(
    grad_pooled_BD: Tensor, x_BTD: Tensor, mask_BT: Tensor, query_D: Tensor | None, pooled: Pooled
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `pool`: of x (B, T, D), dtype of x, exactly 0 outside the mask, and of the query.

    mean:       dx_t = m_t / count * dp
    attention:  ds_t = a_t (dp . x_t - dp . pooled)        (the softmax's sum over t is dp . pooled)
                dx_t = a_t dp + ds_t / sqrt(D) * (query / r - (x_t . query) x_t / (D r^3)),   r = rms(x_t)
                dquery = sum_t ds_t x_t / (r sqrt(D))
    """
    wide = grad_pooled_BD.dtype
    x_wide_BTD = x_BTD.to(wide).masked_fill(~mask_BT[..., None], 0.0)
    if query_D is None:
        weight_BT = mask_BT.to(wide) / pooled.total_B[:, None]
        return (weight_BT[..., None] * grad_pooled_BD[:, None]).to(x_BTD.dtype), None
    query_D = query_D.to(wide)
    width = x_BTD.shape[-1]
    weight_BT = torch.exp(scores(x_wide_BTD, query_D) - pooled.peak_B[:, None]) / pooled.total_B[:, None]
    weight_BT = torch.where(mask_BT, weight_BT, 0.0)
    rms_BT1 = torch.sqrt(x_wide_BTD.square().mean(-1, keepdim=True) + ROUTER_EPS)
    along_BT = torch.einsum("bd,btd->bt", grad_pooled_BD, x_wide_BTD)
    grad_score_BT = weight_BT * (along_BT - (grad_pooled_BD * pooled.pooled_BD).sum(-1, keepdim=True))
    scaled_BT1 = grad_score_BT[..., None] * width**-0.5 / rms_BT1
    direction_BTD = query_D - (x_wide_BTD @ query_D)[..., None] * x_wide_BTD / (width * rms_BT1.square())
    grad_x_BTD = weight_BT[..., None] * grad_pooled_BD[:, None] + scaled_BT1 * direction_BTD
    return grad_x_BTD.to(x_BTD.dtype), (scaled_BT1 * x_wide_BTD).sum((0, 1))
