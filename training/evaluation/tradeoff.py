"""What every router threshold would cost and bring, by arithmetic: both branches were asked every query once.

For a threshold t, query i thinks where p_i >= t; its tokens and its verdict are then those of the thinking answer, else
those of the non-thinking one. Only the order of the probabilities matters, so a data set of N queries has at most
N + 1 different outcomes: one per gap between neighbouring probabilities. Each is represented by one threshold, midway
between its neighbours (0 and 1 are the outermost neighbours), where a small shift of the probabilities changes nothing.
Queries with the same probability cannot be separated: they think together or not at all.

Ours. Shapes: N queries, K outcomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metis_home.errors import DataError

from .metrics import thinks

TargetKind = Literal["thinking_ratio", "mean_tokens", "accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is known about one query after both branches answered it."""

    thinking_probability: float
    tokens: tuple[int, int]
    """Tokens of the (non-thinking, thinking) answer."""
    correct: tuple[bool | None, bool | None]
    """Verdict on each; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one threshold does on the data."""

    threshold: float
    thinking: int
    """How many queries think."""
    thinking_ratio: float
    mean_tokens: float
    accuracy: float | None
    """Over the queries with a verdict on both answers; None where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the user asks for: a thinking ratio to come close to, a mean token count to stay under, or an accuracy."""

    kind: TargetKind
    value: float

    def __post_init__(self) -> None:
        upper = float("inf") if self.kind == "mean_tokens" else 1.0
        if not 0 <= self.value <= upper:
            raise DataError(f"a target for {self.kind} must lie in [0, {upper:g}]; found {self.value!r}")


def trade_off(queries: Sequence[Query]) -> list[Outcome]:
    """Every outcome that some threshold has on these queries, from most thinking to least.

    Nobody thinks in the last outcome, unless a probability is exactly 1: thresholds end at 1, so that query always
    thinks. Accuracy counts the queries with a verdict on both answers, so that all outcomes count the same ones.

    Raises:
        DataError: no queries, or a probability outside [0, 1].
    """
    if not queries:
        raise DataError("a trade-off needs at least one query; found none")
    # The router computes and compares in float32; a float64 midpoint may round onto its lower neighbour there.
    probability_N = np.array([query.thinking_probability for query in queries], dtype=np.float32)
    if not bool(((probability_N >= 0) & (probability_N <= 1)).all()):
        raise DataError("P(thinking) must lie in [0, 1] for every query; found a value outside, or NaN")
    order = np.argsort(probability_N, kind="stable")
    probability_N = probability_N[order]
    tokens_N2 = np.array([queries[index].tokens for index in order], dtype=np.int64)
    scored_N = np.array([None not in queries[index].correct for index in order])
    correct_N2 = (
        np.array([[bool(verdict) for verdict in queries[index].correct] for index in order]) & scored_N[:, None]
    )

    # With a cut after k queries (in order of probability), the first k answer directly and the others think.
    tokens_K = _sum_over_cuts(tokens_N2)
    correct_K = _sum_over_cuts(correct_N2.astype(np.int64))
    scored = int(scored_N.sum())
    values, first_of_value = np.unique(probability_N, return_index=True)
    cuts = [int(first) for first in first_of_value]
    if values[-1] < 1:
        cuts.append(len(queries))
    bounds = [np.float32(0), *values, np.float32(1)]
    return [
        Outcome(
            threshold=_between(bounds[place], bounds[place + 1]),
            thinking=len(queries) - cut,
            thinking_ratio=(len(queries) - cut) / len(queries),
            mean_tokens=int(tokens_K[cut]) / len(queries),
            accuracy=int(correct_K[cut]) / scored if scored else None,
        )
        for place, cut in enumerate(cuts)
    ]


def pick(outcomes: Sequence[Outcome], target: Target) -> Outcome:
    """The outcome that fits the target best.

    | target | admitted | best |
    |---|---|---|
    | thinking_ratio R | all | nearest to R; then higher accuracy; then fewer tokens |
    | mean_tokens N | mean tokens <= N | highest accuracy; then fewer tokens; then less thinking |
    | accuracy A | accuracy >= A | fewest tokens; then higher accuracy; then less thinking |

    Raises:
        DataError: no threshold reaches the target (the message names the reachable range), or an accuracy is needed and
            no query has a verdict.
    """
    value = target.value
    if target.kind != "thinking_ratio" and any(outcome.accuracy is None for outcome in outcomes):
        raise DataError(f"a target for {target.kind} needs verdicts, and no query has one: do the rows have an answer?")
    if target.kind == "thinking_ratio":
        low, high = _range(outcome.thinking_ratio for outcome in outcomes)
        queries = outcomes[0].thinking  # in the first outcome everybody thinks
        if not low - 0.5 / queries <= value <= high + 0.5 / queries:
            raise DataError(
                f"no threshold gives a thinking ratio of {value:g}: on these {queries} queries it lies between "
                f"{low:g} and {high:g}"
            )
        return min(
            outcomes,
            key=lambda found: (abs(found.thinking_ratio - value), -(found.accuracy or 0.0), found.mean_tokens),
        )
    if target.kind == "mean_tokens":
        affordable = [found for found in outcomes if found.mean_tokens <= value]
        if not affordable:
            low, high = _range(outcome.mean_tokens for outcome in outcomes)
            raise DataError(
                f"no threshold stays at {value:g} tokens per query: on these queries the mean lies between {low:g} "
                f"and {high:g}"
            )
        return min(affordable, key=lambda found: (-(found.accuracy or 0.0), found.mean_tokens, found.thinking))
    good = [found for found in outcomes if found.accuracy is not None and found.accuracy >= value]
    if not good:
        low, high = _range(outcome.accuracy or 0.0 for outcome in outcomes)
        raise DataError(
            f"no threshold reaches an accuracy of {value:g}: on these queries it lies between {low:.4f} and {high:.4f}"
        )
    return min(good, key=lambda found: (found.mean_tokens, -(found.accuracy or 0.0), found.thinking))


def at_threshold(queries: Sequence[Query], threshold: float) -> Outcome:
    """The outcome of one given threshold, computed query by query.

    Raises:
        DataError: no queries.
    """
    if not queries:
        raise DataError("an outcome needs at least one query; found none")
    branch = [int(thinks(query.thinking_probability, threshold)) for query in queries]
    scored = [
        bool(query.correct[chosen]) for query, chosen in zip(queries, branch, strict=True) if None not in query.correct
    ]
    tokens = sum(query.tokens[chosen] for query, chosen in zip(queries, branch, strict=True))
    return Outcome(
        threshold=threshold,
        thinking=sum(branch),
        thinking_ratio=sum(branch) / len(queries),
        mean_tokens=tokens / len(queries),
        accuracy=sum(scored) / len(scored) if scored else None,
    )


def _sum_over_cuts(value_N2: np.ndarray) -> np.ndarray:
    """(N, 2) -> (N + 1,): entry k is the sum of column 0 over the first k rows and of column 1 over the rest."""
    direct = np.concatenate([[0], np.cumsum(value_N2[:, 0])])
    thought = np.concatenate([[0], np.cumsum(value_N2[::-1, 1])])[::-1]
    return direct + thought


def _between(low: np.float32, high: np.float32) -> float:
    """A float32 t with low < t <= high, midway where there is room; 0 where low = high = 0 (all think)."""
    middle = np.float32((float(low) + float(high)) / 2)
    return float(middle if low < middle <= high else high)


def _range(values) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)
