"""How much better a rollout is than the others of its prompt: GRPO's advantage and HDPO's two.

Rewards are (P, G) tensors, NaN where a rollout could not be scored. Such a rollout is left out of the statistics of its
group and gets the advantage 0: nothing is known about it, so it must neither be pushed nor move its neighbours.

Shapes: P prompts, G rollouts per prompt.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from metis_home.errors import RewardError

# Rewards closer than this, relative to max(1, |reward|), count as equal. Ours: eight times float32's spacing at 1, so
# sums of weighted rewards that differ only in rounding are ties, and no two different rewards in use are.
TIE_TOLERANCE = 1e-6


def grpo_advantages(reward_PG: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Score each rollout against the other rollouts of its prompt.

    A[p, g] = (r[p, g] - mean_g r[p]) / (std_g r[p] + eps), with the unbiased std (N - 1).

    Args:
        reward_PG: total reward, unitless, shape (P, G), any float dtype; NaN: not scored.
        eps: added to the deviation, same unit as the reward.
    Returns:
        Advantages, shape (P, G), float32; exactly 0 where all rewards of a prompt are equal (also for a single rollout)
        and where a rollout was not scored.
    Raises:
        RewardError: not (P, G), or infinite rewards.
    Source: GRPO; the tie rule is ours (without it rounding noise of up to 0.1 passes for a signal).
    """
    check_rewards(reward_PG)
    return _normalise(reward_PG, ~reward_PG.isnan(), eps)


def hdpo_advantages(
    accuracy_reward_PG: Tensor,
    efficiency_reward_PG: Tensor,
    *,
    compat: Literal["reference"] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """HDPO's decoupled advantages: accuracy against the whole group, efficiency against the group's correct rollouts.

    A_acc  = (r_acc - mean_g) / (std_g + eps)
    A_tool = (r_tool - mean_Q) / (std_Q + eps) inside Q = {r_tool > 0} where |Q| >= 2, else 0

    Args:
        accuracy_reward_PG: shape (P, G), e.g. 0.9 * answer + 0.1 * format; NaN: not scored.
        efficiency_reward_PG: shape (P, G), 1 / (T + 1) for a correct rollout with T tool turns, 0 for a wrong one; a
            rollout is correct where this is > 0. NaN: not scored.
        compat: "reference" reproduces the released code bit for bit in float32: groups with equal rewards keep their
            rounding noise, a group of one has the reward itself as its advantage, and what was not scored counts as 0.
        eps: added to the deviations.
    Returns:
        Accuracy and efficiency advantages, each (P, G) float32.
    Raises:
        RewardError: shapes differ or are not (P, G); infinite rewards; an unknown `compat`.
    Source: HDPO (arXiv 2604.08545) and its released implementation; tie rule ours.
    """
    check_rewards(accuracy_reward_PG)
    check_rewards(efficiency_reward_PG)
    if accuracy_reward_PG.shape != efficiency_reward_PG.shape:
        raise RewardError(
            f"accuracy rewards have shape {tuple(accuracy_reward_PG.shape)}, efficiency rewards "
            f"{tuple(efficiency_reward_PG.shape)}; expected one of each per rollout"
        )
    if compat == "reference":
        return _reference_advantages(accuracy_reward_PG, efficiency_reward_PG, eps)
    if compat is not None:
        raise RewardError(f'compat is {compat!r}; expected None or "reference"')
    accuracy_PG = _normalise(accuracy_reward_PG, ~accuracy_reward_PG.isnan(), eps)
    efficiency_PG = _normalise(efficiency_reward_PG, efficiency_reward_PG > 0, eps)  # NaN > 0 is false
    return accuracy_PG, efficiency_PG


def efficiency_members(
    efficiency_reward_PG: Tensor, *, compat: Literal["reference"] | None = None, eps: float = 1e-6
) -> Tensor:
    """Which rollouts take part in HDPO's efficiency loss, bool (P, G): the denominators of that loss count their tokens.

    Ours: the correct rollouts of groups whose correct rollouts differ in efficiency, also one that happens to sit
    exactly on the mean. Reference: those whose advantage is not 0, rounding noise included.
    """
    correct_PG = efficiency_reward_PG > 0
    if compat == "reference":
        return hdpo_advantages(torch.zeros_like(efficiency_reward_PG), efficiency_reward_PG, compat=compat, eps=eps)[
            1
        ].ne(0)
    return correct_PG & _has_spread(efficiency_reward_PG, correct_PG)[:, None]


def informative_groups(reward_PG: Tensor) -> Tensor:
    """Which prompts have rollouts of different reward, bool (P,): the others teach nothing."""
    check_rewards(reward_PG)
    return _has_spread(reward_PG, ~reward_PG.isnan())


def reward_tensor(rewards: Sequence[Sequence[float | None]]) -> Tensor:
    """P lists of G rewards as a (P, G) float64 tensor, NaN for None."""
    rows = [[float("nan") if value is None else float(value) for value in row] for row in rewards]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1)


def check_rewards(reward_PG: Tensor) -> None:
    """Raise unless this is a (P, G) float tensor without infinities.

    Raises:
        RewardError: it is not.
    """
    if reward_PG.dim() != 2 or not reward_PG.is_floating_point():
        raise RewardError(
            f"rewards must be a float tensor of shape (prompts, rollouts per prompt); found {reward_PG.dtype}, "
            f"{tuple(reward_PG.shape)}"
        )
    if bool(reward_PG.isinf().any()):
        raise RewardError("a reward is infinite; return None for what cannot be scored")


def _has_spread(value_PG: Tensor, member_PG: Tensor) -> Tensor:
    """(P,) bool: at least two members, not all equal."""
    if value_PG.numel() == 0:
        return torch.zeros(value_PG.shape[0], dtype=torch.bool, device=value_PG.device)
    value_PG = value_PG.double()
    highest_P = value_PG.masked_fill(~member_PG, float("-inf")).amax(1)
    lowest_P = value_PG.masked_fill(~member_PG, float("inf")).amin(1)
    scale_P = torch.maximum(highest_P.abs(), lowest_P.abs()).clamp(min=1.0)
    return (member_PG.sum(1) >= 2) & (highest_P - lowest_P > TIE_TOLERANCE * scale_P)


def _normalise(value_PG: Tensor, member_PG: Tensor, eps: float) -> Tensor:
    """Centre and scale the members of each group in float64; 0 for everybody else and for groups without spread."""
    exact_PG = value_PG.double().masked_fill(~member_PG, 0.0)
    count_P1 = member_PG.sum(1, keepdim=True).double()
    mean_P1 = exact_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = (exact_PG - mean_P1).masked_fill(~member_PG, 0.0)
    std_P1 = (centred_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
    counts_PG = member_PG & _has_spread(value_PG, member_PG)[:, None]
    return (centred_PG / (std_P1 + eps)).masked_fill(~counts_PG, 0.0).float()


def _reference_advantages(accuracy_PG: Tensor, efficiency_PG: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Group by group on 1-D float32 tensors: another order of summation would give other last bits."""
    accuracy_PG = accuracy_PG.float().nan_to_num(nan=0.0)
    efficiency_PG = efficiency_PG.float().nan_to_num(nan=0.0)
    out_acc_PG, out_tool_PG = torch.zeros_like(accuracy_PG), torch.zeros_like(efficiency_PG)
    for p, (accuracy_G, efficiency_G) in enumerate(zip(accuracy_PG, efficiency_PG, strict=True)):
        if accuracy_G.numel() == 1:
            out_acc_PG[p] = accuracy_G / (1.0 + eps)  # mean 0, std 1
        else:
            out_acc_PG[p] = (accuracy_G - torch.mean(accuracy_G)) / (torch.std(accuracy_G) + eps)
        qualified = efficiency_G > 0
        if int(qualified.sum()) >= 2:
            score_Q = efficiency_G[qualified]
            out_tool_PG[p, qualified] = (score_Q - torch.mean(score_Q)) / (torch.std(score_Q) + eps)
    return out_acc_PG, out_tool_PG
