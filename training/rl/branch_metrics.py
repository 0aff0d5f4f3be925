"""What a two-branch policy does: who answers, how well, at what length, and what the router's probability is worth.

Names of bins are percentages: `router/p_thinking/20-30` is the share of rollouts whose prompt the router gave 0.2 to 0.3.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from metis_home.branch import Branch

from .. import collectives
from ..rollouts.types import Rollout

BINS = tuple(f"{10 * number:02d}-{10 * number + 10}" for number in range(10))


def branch_sums(rollouts: Sequence[Rollout], correct: Sequence[bool | None], *, drawn: bool) -> dict[str, float]:
    """Numbers of one rank that may be added up over ranks, with the same names on each.

    Args:
        correct: by rollout; None: not judged.
        drawn: branches were drawn from the router's probability, which `branch_logprob` then holds.
    """
    sums: dict[str, float] = {}
    for branch in Branch:
        own = [(rollout, right) for rollout, right in zip(rollouts, correct, strict=True) if rollout.branch == branch]
        _count(sums, branch.label, own)
        if drawn:
            places = [_bin(rollout) for rollout, _ in own]
            for number, name in enumerate(BINS):
                _count(
                    sums, f"{branch.label}/{name}", [pair for pair, at in zip(own, places, strict=True) if at == number]
                )
    return {f"branch/{name}": value for name, value in sums.items()}


def named_branch_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of these sums; those that are about nothing are left out."""
    found: dict[str, float] = {}
    everyone = sum(sums[f"branch/{branch.label}/rollouts"] for branch in Branch)
    for branch in Branch:
        own = f"branch/{branch.label}"
        if sums[f"{own}/rollouts"]:
            found[f"length/{branch.label}"] = sums[f"{own}/tokens"] / sums[f"{own}/rollouts"]
        if sums[f"{own}/judged"]:
            found[f"accuracy/{branch.label}"] = sums[f"{own}/right"] / sums[f"{own}/judged"]
    for name in BINS:
        bins = [f"branch/{branch.label}/{name}" for branch in Branch]
        count = sum(sums.get(f"{bin_}/rollouts", 0) for bin_ in bins)
        if count:
            found[f"router/p_thinking/{name}"] = count / everyone
        for branch, bin_ in zip(Branch, bins, strict=True):
            if sums.get(f"{bin_}/judged"):
                found[f"router/accuracy/{branch.label}/{name}"] = sums[f"{bin_}/right"] / sums[f"{bin_}/judged"]
    return found


def thinking_by_source(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The share of thinking answers in each collection of prompts, over all ranks (which all must call this)."""
    own: dict[str, tuple[int, int]] = {}
    for rollout in rollouts:
        if rollout.branch is not None:
            source = str(rollout.prompt.columns.get("source") or "unnamed")
            thinking, count = own.get(source, (0, 0))
            own[source] = (thinking + (rollout.branch == Branch.THINKING), count + 1)
    ranks = collectives.gather(own)
    shares = {}
    for source in sorted({source for counts in ranks for source in counts}):
        thinking, count = np.sum([counts.get(source, (0, 0)) for counts in ranks], axis=0)
        shares[f"thinking_ratio/{source}"] = float(thinking / count)
    return shares


def _count(sums: dict[str, float], name: str, pairs: Sequence[tuple[Rollout, bool | None]]) -> None:
    judged = [right for _, right in pairs if right is not None]
    sums[f"{name}/rollouts"] = len(pairs)
    sums[f"{name}/tokens"] = sum(rollout.policy_tokens for rollout, _ in pairs)
    sums[f"{name}/judged"] = len(judged)
    sums[f"{name}/right"] = sum(judged)


def _bin(rollout: Rollout) -> int:
    chosen = float(np.exp(rollout.branch_logprob))
    thinking = chosen if rollout.branch == Branch.THINKING else 1 - chosen
    return min(int(thinking * len(BINS)), len(BINS) - 1)
