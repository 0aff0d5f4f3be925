"""Numbers about rollouts and updates, over all ranks: what the logs and the plots show."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metis_home.branch import Branch

from .. import collectives
from ..rollouts.types import Rollout
from .branch_metrics import branch_sums, named_branch_metrics, thinking_by_source

if TYPE_CHECKING:
    from .rl_buffer import Filling, Group

STAGES = ("rollout", "reward", "prepare", "update")


class Stopwatch:
    """Adds up the seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def filling_metrics(
    filling: "Filling", reward_names: Sequence[str], correct_name: str, *, drawn: bool = False
) -> dict[str, float]:
    """Metrics of one filling, over all ranks (which all must call this).

    Rewards, pass rates and lengths are of everything that was drawn; advantages of what is trained on.

    Args:
        drawn: branches were drawn from the router's probability.
    """
    rollouts = [rollout for group in filling.groups for rollout in group.rollouts]
    sums = _Sums()
    totals = [value for group in filling.groups for value in group.scores.total]
    sums.moments("reward", [value for value in totals if value is not None])
    sums.add("unscored", sum(value is None for value in totals))
    for name in reward_names:
        values = [value for group in filling.groups for value in group.scores.components[name]]
        sums.moments(f"rewards/{name}", [value for value in values if value is not None])
        sums.add(f"rewards/{name}_unscored", sum(value is None for value in values))
    for group in filling.groups:
        sums.add("groups/drawn", 1)
        sums.add("groups/zero_std", not group.is_informative)
        sums.add(f"pass/{_pass_bucket(group, correct_name)}", 1)
    for name in ("none", "some", "all", "unscored"):
        sums.add(f"pass/{name}", 0)
    values = [value for group in filling.groups for value in group.scores.components[correct_name]]
    correct = [None if value is None else value > 0.5 for value in values]
    lengths = [rollout.policy_tokens for rollout in rollouts]
    sums.moments("accuracy", [float(right) for right in correct if right is not None])
    sums.moments("length", lengths)
    sums.moments("length_correct", [n for n, right in zip(lengths, correct, strict=True) if right])
    sums.moments("length_wrong", [n for n, right in zip(lengths, correct, strict=True) if right is False])
    sums.largest("length_max", max(lengths, default=0))
    sums.add("truncated", sum(not rollout.finished for rollout in rollouts))
    sums.add("tool_calls", sum(rollout.tool_calls for rollout in rollouts))
    sums.add("thinking", sum(rollout.branch == Branch.THINKING for rollout in rollouts))
    sums.moments("advantage", [sample.advantage for sample in filling.samples if sample.tokens])
    sums.add("advantage_abs", sum(abs(sample.advantage) for sample in filling.samples if sample.tokens))
    sums.largest("rounds_max", filling.rounds)
    for stage in ("rollout", "reward"):
        sums.largest(f"seconds_{stage}_max", filling.seconds.get(stage, 0.0))
    has_branches = _any_branches(rollouts)
    if has_branches:
        sums.values |= branch_sums(rollouts, correct, drawn=drawn)
    named = _named(collectives.sum_dicts(sums.values), reward_names, has_branches)
    return named | (thinking_by_source(rollouts) if has_branches else {})


def filling_columns(filling: "Filling") -> dict[str, float]:
    """Of this rank: what the verifier counted, and the mean of what reward functions gave to `log_metric`."""
    from ..verifier import verdict_counts

    found: dict[str, list[float]] = defaultdict(list)
    for group in filling.groups:
        for name, values in group.scores.metrics.items():
            found[name] += values
    return verdict_counts.take() | {name: sum(values) / len(values) for name, values in found.items() if values}


def _any_branches(rollouts: Sequence[Rollout]) -> bool:
    has = any(rollout.branch is not None for rollout in rollouts)
    return bool(collectives.max_over_ranks([float(has)])[0])


def _pass_bucket(group: "Group", correct_name: str) -> str:
    values = [value > 0.5 for value in group.scores.components[correct_name] if value is not None]
    if not values:
        return "unscored"
    return "all" if all(values) else "some" if any(values) else "none"


def _named(sums: Mapping[str, float], reward_names: Sequence[str], has_branches: bool) -> dict[str, float]:
    count = max(sums["length_count"], 1)
    groups = max(sums["groups/drawn"], 1)
    named = {
        "reward": _mean(sums, "reward"),
        "reward_std": _std(sums, "reward"),
        "unscored_fraction": sums["unscored"] / count,
    }
    for name in reward_names:
        named[f"rewards/{name}/mean"] = _mean(sums, f"rewards/{name}")
        named[f"rewards/{name}/std"] = _std(sums, f"rewards/{name}")
        if sums[f"rewards/{name}_unscored"]:
            named[f"rewards/{name}/unscored_fraction"] = sums[f"rewards/{name}_unscored"] / count
    named |= {
        "groups/zero_std_fraction": sums["groups/zero_std"] / groups,
        "groups/drawn": sums["groups/drawn"],
        "groups/rounds": sums["rounds_max"],
        "pass_rate/none": sums["pass/none"] / groups,
        "pass_rate/some": sums["pass/some"] / groups,
        "pass_rate/all": sums["pass/all"] / groups,
        "accuracy": _mean(sums, "accuracy"),
        "tokens_per_correct": sums["length_sum"] / sums["accuracy_sum"] if sums["accuracy_sum"] else math.nan,
        "length/mean": _mean(sums, "length"),
        "length/correct": _mean(sums, "length_correct"),
        "length/wrong": _mean(sums, "length_wrong"),
        "length/max": sums["length_max"],
        "length/truncated_fraction": sums["truncated"] / count,
        "tool_calls": sums["tool_calls"] / count,
        "advantage/mean": _mean(sums, "advantage"),
        "advantage/std": _std(sums, "advantage"),
        "advantage/abs": sums["advantage_abs"] / max(sums["advantage_count"], 1),
        "seconds/rollout": sums["seconds_rollout_max"],
        "seconds/reward": sums["seconds_reward_max"],
        "rollout_tokens_per_second": sums["length_sum"] / max(sums["seconds_rollout_max"], 1e-9),
    }
    if has_branches:
        named["thinking_ratio"] = sums["thinking"] / count
        named |= named_branch_metrics(sums)
    return {name: value for name, value in named.items() if not math.isnan(value)}


class _Sums:
    """Named numbers that can be added up over ranks."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self.values[name] = self.values.get(name, 0.0) + float(value)

    def largest(self, name: str, value: float) -> None:
        self.values[name] = max(self.values.get(name, 0.0), float(value))

    def moments(self, name: str, values: Sequence[float]) -> None:
        self.add(f"{name}_count", len(values))
        self.add(f"{name}_sum", sum(values))
        self.add(f"{name}_squares", sum(value * value for value in values))


def _mean(sums: Mapping[str, float], name: str) -> float:
    count = sums[f"{name}_count"]
    return sums[f"{name}_sum"] / count if count else math.nan


def _std(sums: Mapping[str, float], name: str) -> float:
    count = sums[f"{name}_count"]
    if not count:
        return math.nan
    mean = sums[f"{name}_sum"] / count
    return math.sqrt(max(0.0, sums[f"{name}_squares"] / count - mean * mean))


class UpdateMetrics:
    """Adds up the sums of micro-batches until they are logged.

    Args:
        names: of the sums, the same on every rank.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Take in one micro-batch; costs no synchronisation."""
        for name in self._names:
            value = sums[name]
            before = self._sums.get(name)
            if before is None:
                self._sums[name] = value
            else:
                before = before.to(value.device)  # what a checkpoint brought back is on the CPU
                self._sums[name] = before.maximum(value) if name.endswith("_max") else before + value

    def state_dict(self) -> dict[str, float]:
        """This rank's sums since the last log."""
        return {name: float(value) for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up such sums."""
        self._sums = {name: torch.tensor(value) for name, value in state.items()}

    def flush(self) -> dict[str, float]:
        """The metrics since the last call, over all ranks (which all must call this); empty without any update."""
        local = {name: float(self._sums.get(name, 0.0)) for name in self._names}
        self._sums = {}
        totals = collectives.sum_dicts(local)
        if not totals["tokens"]:
            return {}
        tokens = totals["tokens"]
        means = {"ratio": "ratio/mean", "clip_low": "clip/low", "clip_high": "clip/high", "entropy": "entropy"}
        means |= {
            "kl_old": "kl/old",
            "kl_ref": "kl/ref",
            "importance": "sampler/importance",
            "sampler_gap": "sampler/gap",
        }
        named = {label: totals[name] / tokens for name, label in means.items() if name in totals}
        named["ratio/max"] = totals["ratio_max"]
        named["update_tokens"] = tokens
        if "sampler_gap_max" in totals:
            named["sampler/gap_max"] = totals["sampler_gap_max"]
        if totals.get("router_tokens"):
            for name in ("entropy", "clip_low", "clip_high"):
                named[f"router/{name}"] = totals[f"router_{name}"] / totals["router_tokens"]
        return named
