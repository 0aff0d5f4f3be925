"""The router: one small MLP that reads a prompt and says how likely it needs thought.

Shapes: B batch, T tokens, D hidden size, H router hidden size, E branches (2).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .branch import Branch
from .errors import BranchError, ConfigError
from .router_layout import POOLINGS

ROUTER_EPS = 1e-6
DEFAULT_THRESHOLD = 0.5
IGNORE = -100  # as in the labels of every Hugging Face model


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterDecision:
    """What the router said about each query of a batch."""

    branch_ids: Tensor
    """(B,) int64, a `Branch` value: `THINKING` where `thinking_probability` >= the threshold."""
    thinking_probability: Tensor
    """(B,) float32 in [0, 1]."""
    logits: Tensor
    """(B, E) float32, unnormalised."""


class MetisHomeRouter(nn.Module):
    """Pool a prompt's input embeddings and classify it: logits for (non-thinking, thinking).

    It sees the embeddings that enter layer 0, with image and video features merged in: everything after the first FFN
    already depends on the branch (and so could not decide it). It always computes in float32, also under autocast.

        mean:       pooled = sum_t m_t x_t / max(1, sum_t m_t)
        attention:  pooled = sum_t a_t x_t,   a = softmax over m_t = 1 of (x_t / rms(x_t)) . query / sqrt(D)
        logits     = W_output SiLU(W_hidden RMSNorm(pooled) + b_hidden) + b_output

    A row without any prompt token pools to zero.

    Source: Metis-HOME (arXiv 2510.20519) says "an MLP that allocates queries"; pooling, norm and sizes are ours.
    """

    def __init__(self, hidden_size: int, router_hidden_size: int, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigError(f"router_pooling must be one of {', '.join(POOLINGS)}; found {pooling!r}")
        self.pooling = pooling
        self.norm = nn.RMSNorm(hidden_size, eps=ROUTER_EPS)
        self.hidden = nn.Linear(hidden_size, router_hidden_size)
        self.output = nn.Linear(router_hidden_size, len(Branch))
        self.query = nn.Parameter(torch.zeros(hidden_size)) if pooling == "attention" else None

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the router's logits.

        Args:
            x_BTD: input embeddings with visual features merged in, (B, T, D), any float dtype.
            mask_BT: true (or 1) at prompt tokens, false at padding and at answer tokens, (B, T); None means all. With
                x of shape (1, T, D) it may have any number of rows: queries whose tokens stand in one row.
        Returns:
            Logits, (B, 2), float32; one row per row of the mask.
        """
        with torch.autocast(device_type=x_BTD.device.type, enabled=False):
            pooled_BD = self.pool(x_BTD.float(), mask_BT)
            normed_BD = F.rms_norm(pooled_BD, self.norm.normalized_shape, self.norm.weight.float(), ROUTER_EPS)
            hidden_BH = F.silu(F.linear(normed_BD, self.hidden.weight.float(), self.hidden.bias.float()))
            return F.linear(hidden_BH, self.output.weight.float(), self.output.bias.float())

    def pool(self, x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Pool the masked tokens of float32 `x_BTD` to (B, D); B is that of the mask."""
        if mask_BT is None:
            mask_BT = torch.ones(x_BTD.shape[:2], device=x_BTD.device)
        mask_BT = mask_BT.to(device=x_BTD.device, dtype=torch.bool)
        is_shared = x_BTD.shape[0] == 1 != mask_BT.shape[0]
        # Padding may hold anything, also NaN: 0 * NaN would survive a product.
        read_BT = mask_BT.any(0, keepdim=True) if is_shared else mask_BT
        x_BTD = x_BTD.masked_fill(~read_BT[..., None], 0.0)
        if self.query is None:
            weight_BT = mask_BT.to(x_BTD.dtype)
            weight_BT = weight_BT / weight_BT.sum(1, keepdim=True).clamp(min=1.0)
        else:
            direction_BTD = x_BTD * torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + ROUTER_EPS)
            score_BT = direction_BTD @ self.query.float() * x_BTD.shape[-1] ** -0.5
            # A finite floor: a row without prompt tokens would otherwise be softmax(-inf, ...) = NaN.
            score_BT = score_BT.expand(mask_BT.shape).masked_fill(~mask_BT, torch.finfo(score_BT.dtype).min)
            weight_BT = score_BT.softmax(-1) * mask_BT
        if is_shared:
            return weight_BT @ x_BTD[0]
        return torch.einsum("bt,btd->bd", weight_BT, x_BTD)


def decide(logits_BE: Tensor, threshold: float = DEFAULT_THRESHOLD) -> RouterDecision:
    """Turn router logits into branches: think where P(thinking) >= `threshold`.

    Args:
        logits_BE: (B, 2), float32.
        threshold: in [0, 1]. 0 always thinks. 1 thinks only where the probability rounds to exactly 1.0 in float32
            (logits about 17 apart), so in practice never; to rule thinking out, force the branch instead.
    Raises:
        BranchError: `threshold` is not a number in [0, 1].
    """
    check_threshold(threshold)
    probability_B = logits_BE.float().softmax(-1)[:, Branch.THINKING]
    return RouterDecision(
        branch_ids=(probability_B >= threshold).long(), thinking_probability=probability_B, logits=logits_BE.float()
    )


def check_threshold(threshold: float) -> float:
    """Return `threshold` if it is a number in [0, 1].

    Raises:
        BranchError: it is not.
    """
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not is_number or not 0.0 <= threshold <= 1.0:  # NaN fails the comparison too
        raise BranchError(
            f"router_threshold must be a number in [0, 1]; found {threshold!r}. "
            "A query thinks where P(thinking) >= router_threshold: 0 always thinks."
        )
    return float(threshold)


def router_cross_entropy(logits_BE: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross entropy over the labelled queries; 0, with a gradient of 0, where none is labelled.

    Args:
        logits_BE: (B, 2), float32.
        labels_B: (B,) integers, a `Branch` value, or -100 for a query that does not count.
    Returns:
        A scalar, nats per labelled query.
    Source: Metis-HOME, L_router.
    """
    total = F.cross_entropy(logits_BE, labels_B, ignore_index=IGNORE, reduction="sum")
    return total / (labels_B != IGNORE).sum().clamp(min=1)
