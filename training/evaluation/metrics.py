"""The numbers of an evaluation, as pure functions of plain sequences: no model, no files, no torch.

Shapes: N rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metis_home.errors import DataError

Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
RELIABILITY_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """A share with its 95 % interval; `value` is None where nothing was counted."""

    hits: int
    total: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference of means with its 95 % bootstrap interval; None where there was no pair."""

    rows: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Queries whose P(thinking) fell into [low, high); the last bin includes 1."""

    low: float
    high: float
    rows: int
    mean_probability: float | None
    thinking_share: float | None
    """How many of them should think, in [0, 1]."""


def proportion(hits: int, total: int) -> Proportion:
    """A share and its 95 % Wilson interval.

    centre = (h/n + z^2/2n) / (1 + z^2/n),  half = z sqrt(h/n (1 - h/n)/n + z^2/4n^2) / (1 + z^2/n)

    Unlike the normal approximation it stays inside [0, 1] and is right for 0 and n hits.

    Raises:
        DataError: not 0 <= hits <= total.
    Source: Wilson (1927).
    """
    if not 0 <= hits <= total:
        raise DataError(f"a share needs 0 <= hits <= total; found {hits} of {total}")
    if total == 0:
        return Proportion(hits=0, total=0, value=None, low=None, high=None)
    share, spread = hits / total, Z_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Rounding may leave 1e-17 outside; at 0 and n hits one end is exact.
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == total else min(1.0, centre + half)
    return Proportion(hits=hits, total=total, value=share, low=low, high=high)


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Difference:
    """Mean of first - second over the same queries, with a percentile bootstrap over queries.

    Args:
        first, second: one number per query, in the same order.
        resamples: bootstrap samples (ours: 2000).
    Raises:
        DataError: the sequences have different lengths.
    Source: Efron (1979), percentile interval.
    """
    if len(first) != len(second):
        raise DataError(
            f"a paired difference needs as many numbers on both sides; found {len(first)} and {len(second)}"
        )
    if not len(first):
        return Difference(rows=0, value=None, low=None, high=None)
    delta_N = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 100):  # 100 at a time: 2000 x 10,000 indices would be 160 MB
        stop = min(start + 100, resamples)
        picks = generator.integers(0, len(delta_N), size=(stop - start, len(delta_N)))
        means[start:stop] = delta_N[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(rows=len(delta_N), value=float(delta_N.mean()), low=float(low), high=float(high))


def roc_auc(probability: Sequence[float], is_positive: Sequence[bool]) -> float | None:
    """P(a positive scores above a negative), ties counting one half; None without both kinds.

    AUC = (sum of the positives' midranks - P (P + 1) / 2) / (P N)

    Source: Mann and Whitney (1947).
    """
    score_N, positive_N = np.asarray(probability, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    midrank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(midrank[inverse][positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def reliability(
    probability: Sequence[float], is_positive: Sequence[bool], *, bins: int = RELIABILITY_BINS
) -> tuple[float | None, list[ReliabilityBin]]:
    """Expected calibration error and the bins of a reliability diagram.

    ECE = sum_b (n_b / n) |mean probability in b - share of positives in b|, over equal-width bins of P(thinking).

    Returns:
        (ECE in [0, 1] or None without rows, one entry per bin, empty bins too).
    Source: Naeini et al. (2015); binned on P(thinking), so that both ends are seen.
    """
    score_N, positive_N = np.asarray(probability, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    bin_N = np.minimum((score_N * bins).astype(int), bins - 1)
    error, found = 0.0, []
    for index in range(bins):
        inside = bin_N == index
        rows = int(inside.sum())
        mean = float(score_N[inside].mean()) if rows else None
        share = float(positive_N[inside].mean()) if rows else None
        if mean is not None and share is not None:
            error += rows / len(score_N) * abs(mean - share)
        found.append(
            ReliabilityBin(
                low=index / bins, high=(index + 1) / bins, rows=rows, mean_probability=mean, thinking_share=share
            )
        )
    return (error if len(score_N) else None), found


def confusion(predicted: Sequence[bool], labelled: Sequence[bool]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Counts [label][prediction], index 0 = non-thinking, 1 = thinking."""
    counts = [[0, 0], [0, 0]]
    for thinks, label in zip(predicted, labelled, strict=True):
        counts[int(label)][int(thinks)] += 1
    return (counts[0][0], counts[0][1]), (counts[1][0], counts[1][1])


def share_seconds(seconds: float, tokens: Sequence[int]) -> list[float]:
    """Divide a batch's wall time over its rows: each decoding step costs the same, and its rows share it.

    A row that stopped early does not pay for the steps after it. The sum is `seconds`.

    Args:
        seconds: wall time of the batch, prefill included.
        tokens: new tokens of each row, at least 0.
    """
    steps = max(tokens, default=0)
    if not steps:
        return [seconds / len(tokens)] * len(tokens) if tokens else []
    order = sorted(range(len(tokens)), key=lambda row: tokens[row])
    shares, paid, reached = [0.0] * len(tokens), 0.0, 0
    for place, row in enumerate(order):
        paid += (tokens[row] - reached) / (len(tokens) - place) * seconds / steps
        reached = tokens[row]
        shares[row] = paid
    return shares


def thinks(probability: float, threshold: float) -> bool:
    """Would the router think? It compares in float32, where a threshold such as 0.7 is a little less than 0.7."""
    return bool(np.float32(probability) >= np.float32(threshold))


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean, None of nothing."""
    return math.fsum(values) / len(values) if values else None
