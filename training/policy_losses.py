"""The policy losses of Stage-RL and HDPO: tensors in, loss and metrics out.

Every aggregation is one weight per rollout, computed once for a whole optimizer step over all ranks:

    loss = sum_i weight_i sum_t mask_it c_it          c: the clipped surrogate of one token

so the result does not depend on how the rollouts are cut into micro-batches, nor on how many ranks share them; and a
loss with several surrogates (HDPO) or further terms (KL, NLL) is a sum of such sums.

Shapes: B rollouts of a micro-batch, T tokens, R rollouts of an optimizer step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metis_home.errors import TrainingError

Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo", "dapo"]
AGGREGATIONS: tuple[Aggregation, ...] = ("token_mean", "sequence_mean", "dr_grpo", "dapo")

# exp(20) is far outside every clip range and still finite; the bound of the released HDPO code.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping:
    """How far one update may move a token's probability."""

    low: float = 0.2
    """Ratios below 1 - low are clipped where the advantage is negative. 0.2: DAPO."""
    high: float = 0.28
    """Ratios above 1 + high are clipped where the advantage is positive. 0.28: DAPO's clip-higher."""
    dual: float | None = 3.0
    """Where the advantage is negative, the loss of a token is at most dual * |advantage|; None: no bound.
    3.0: HDPO's reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """One clipped objective: what each rollout is worth, and what each of its tokens weighs."""

    advantage_B: Tensor
    weight_B: Tensor
    """Coefficient / normaliser, (B,); 0 where the rollout takes no part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The loss of one micro-batch, ready to be summed over micro-batches and ranks."""

    loss: Tensor
    """Scalar."""
    sums: dict[str, Tensor]
    """Sums over the micro-batch's policy tokens (scalars): divide by `sums["tokens"]`, after adding micro-batches and
    ranks up. `ratio_max` is a maximum."""


def sequence_weights(
    tokens_R: Tensor,
    aggregation: Aggregation,
    *,
    groups_R: Tensor,
    max_completion_tokens: int,
    totals: "Totals | None" = None,
) -> Tensor:
    """Return the weight of each token of each rollout, (R,) float64.

    token_mean     1 / N                  N tokens of the optimizer step
    sequence_mean  1 / (R |o_i|)          each rollout counts alike (GRPO as printed in Metis-HOME)
    dr_grpo        1 / (R max_tokens)     a constant: length has no influence (Dr. GRPO)
    dapo           1 / (P sum_group |o|)  each prompt counts alike, its tokens too (DAPO as printed)

    Args:
        tokens_R: policy tokens of each rollout of this optimizer step on this rank, integer. Rollouts without any take
            no part and weigh 0.
        groups_R: which prompt each belongs to, integer; a prompt's rollouts are all in this optimizer step.
        max_completion_tokens: the sampler's limit, tokens.
        totals: what all ranks have together; default: this rank alone.
    Raises:
        TrainingError: an unknown aggregation.
    Source: DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783). What TRL calls "dapo" is `token_mean` here.
    """
    tokens_R = tokens_R.double()
    takes_part_R = tokens_R > 0
    totals = totals or count_totals(tokens_R, groups_R)
    if aggregation == "token_mean":
        weight_R = torch.full_like(tokens_R, 1 / max(totals.tokens, 1))
    elif aggregation == "sequence_mean":
        weight_R = 1 / (max(totals.rollouts, 1) * tokens_R.clamp(min=1))
    elif aggregation == "dr_grpo":
        weight_R = torch.full_like(tokens_R, 1 / (max(totals.rollouts, 1) * max_completion_tokens))
    elif aggregation == "dapo":
        _, group_R = groups_R.unique(return_inverse=True)
        group_tokens = torch.zeros(int(group_R.max()) + 1 if len(group_R) else 0).double()
        group_tokens = group_tokens.to(tokens_R.device).index_add(0, group_R, tokens_R)
        weight_R = 1 / (max(totals.groups, 1) * group_tokens[group_R].clamp(min=1))
    else:
        raise TrainingError(f"loss aggregation {aggregation!r} is unknown; choose one of {', '.join(AGGREGATIONS)}")
    return weight_R * takes_part_R


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the rollouts of one optimizer step add up to; sum the fields over ranks."""

    tokens: float
    rollouts: float
    groups: float


def count_totals(tokens_R: Tensor, groups_R: Tensor) -> Totals:
    """Count tokens, rollouts that have any, and prompts with at least one such rollout."""
    present_R = tokens_R > 0
    return Totals(
        tokens=float(tokens_R.sum()),
        rollouts=float(present_R.sum()),
        groups=float(groups_R[present_R].unique().numel()),
    )


def policy_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    mask_BT: Tensor,
    surrogates: Sequence[Surrogate],
    clipping: Clipping,
    *,
    importance_BT: Tensor | None = None,
    ref_logp_BT: Tensor | None = None,
    kl_weight_B: Tensor | None = None,
    nll_weight_B: Tensor | None = None,
    entropy_BT: Tensor | None = None,
) -> PolicyLoss:
    """Sum the clipped surrogates and the optional terms of one micro-batch.

    c = max(-A r, -A clip(r, 1 - low, 1 + high)), and where A < 0: c = min(c, -dual A);  r = exp(logp - old_logp)

    Args:
        logp_BT: log-probability of each token under the policy that is trained, float32, nats; ignored where the mask
            is 0 (may be anything finite).
        old_logp_BT: under the policy that the update started from; None: the same policy, r is exactly 1.
        mask_BT: 1 where the policy chose the token, 0 at prompts, observations and padding.
        surrogates: one for GRPO, two for HDPO.
        importance_BT: factor for each token's surrogate, see `importance_weights`; no gradient flows through it.
        ref_logp_BT, kl_weight_B: adds weight * k3(policy || reference) per token.
        nll_weight_B: adds weight * (-logp) per token: the likelihood of correct rollouts (VAPO).
        entropy_BT: only reported.
    Returns:
        Loss and metric sums.
    Source: PPO, DAPO, dual clip (arXiv 1912.09729); k3: http://joschu.net/blog/kl-approx.html.
    """
    mask_BT = mask_BT.to(logp_BT.dtype)
    policy_logp_BT = torch.where(mask_BT > 0, logp_BT, 0.0)  # padding may hold anything
    old_BT = policy_logp_BT.detach() if old_logp_BT is None else torch.where(mask_BT > 0, old_logp_BT, 0.0)
    log_ratio_BT = (policy_logp_BT - old_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clipping.low, 1 + clipping.high)

    loss = logp_BT.new_zeros(())
    low_BT = high_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    for surrogate in surrogates:
        advantage_B1 = surrogate.advantage_B.to(logp_BT)[:, None]
        token_BT = torch.maximum(-advantage_B1 * ratio_BT, -advantage_B1 * clipped_BT)
        if clipping.dual is not None:
            token_BT = torch.where(advantage_B1 < 0, torch.minimum(token_BT, -clipping.dual * advantage_B1), token_BT)
        if importance_BT is not None:
            token_BT = token_BT * importance_BT.detach()
        weight_B1 = surrogate.weight_B.to(logp_BT)[:, None]
        loss = loss + (token_BT * mask_BT * weight_B1).sum()
        takes_part_BT = (mask_BT > 0) & (weight_B1 != 0)
        low_BT = low_BT | (takes_part_BT & (advantage_B1 < 0) & (ratio_BT < 1 - clipping.low))
        high_BT = high_BT | (takes_part_BT & (advantage_B1 > 0) & (ratio_BT > 1 + clipping.high))

    sums = {
        "tokens": mask_BT.sum(),
        "ratio": (ratio_BT * mask_BT).sum(),
        "ratio_max": (ratio_BT * mask_BT).amax() if mask_BT.numel() else mask_BT.sum(),
        "clip_low": low_BT.sum(),
        "clip_high": high_BT.sum(),
        # k3 of the policy that sampled against the one that is trained
        "kl_old": ((ratio_BT - 1 - log_ratio_BT) * mask_BT).sum(),
    }
    if entropy_BT is not None:
        sums["entropy"] = (entropy_BT * mask_BT).sum()
    if ref_logp_BT is not None:
        kl_BT = k3(policy_logp_BT, torch.where(mask_BT > 0, ref_logp_BT, 0.0)) * mask_BT
        sums["kl_ref"] = kl_BT.sum()
        if kl_weight_B is not None:
            loss = loss + (kl_BT * kl_weight_B.to(logp_BT)[:, None]).sum()
    if nll_weight_B is not None:
        loss = loss - (policy_logp_BT * mask_BT * nll_weight_B.to(logp_BT)[:, None]).sum()
    if importance_BT is not None:
        sums["importance"] = (importance_BT * mask_BT).sum()
    return PolicyLoss(loss=loss, sums={name: value.detach() for name, value in sums.items()})


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || reference) per token: exp(d) - 1 - d with d = ref - logp; never negative."""
    difference_BT = (ref_logp_BT - logp_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference_BT.exp() - 1 - difference_BT


def importance_weights(trainer_logp_BT: Tensor, sampler_logp_BT: Tensor, *, cap: float | None) -> Tensor:
    """Correct for a sampler whose probabilities differ from the trainer's: min(p_trainer / p_sampler, cap) per token.

    Args:
        trainer_logp_BT: by the trainer, at the weights that the sampler was given, nats.
        sampler_logp_BT: by the sampler, nats.
        cap: upper bound, 2 to 3 in use; None: none.
    Returns:
        Weights (B, T) without gradient.
    Source: truncated importance sampling; defaults as in the recipes of TRL and verl.
    """
    log_ratio_BT = (trainer_logp_BT.detach() - sampler_logp_BT.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight_BT = log_ratio_BT.exp()
    return weight_BT if cap is None else weight_BT.clamp(max=cap)


def reference_hdpo_weights(
    mask_BT: Tensor, tool_advantage_B: Tensor, *, w_acc: float, w_tool: float, step_rollouts: int
) -> tuple[Tensor, Tensor]:
    """The token weights of HDPO's released code for one micro-batch, (B,) each: its result depends on the packing.

    Both losses are token means inside the micro-batch, scaled by micro_rows / mini_rows. The efficiency loss counts the
    tokens of rows with any advantage that is not 0; if there is none, all tokens (that loss is then 0).

    Args:
        mask_BT: policy tokens. tool_advantage_B: efficiency advantages, rounding noise included.
        w_acc, w_tool: 1.0 and 0.15 in the release.
        step_rollouts: rollouts of the optimizer step on this rank.
    Source: HDPO's released code.
    """
    tokens_B = mask_BT.sum(1).double()
    share = mask_BT.shape[0] / step_rollouts
    member_B = tool_advantage_B != 0
    if not bool((tokens_B * member_B).any()):
        member_B = torch.ones_like(member_B)
    tool_tokens = (tokens_B * member_B).sum().clamp(min=1)
    weight_acc_B = torch.full_like(tokens_B, w_acc * share) / tokens_B.sum().clamp(min=1)
    return weight_acc_B, member_B.double() * (w_tool * share) / tool_tokens
