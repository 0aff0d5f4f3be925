"""What Stage-SFT reports, computed from one line of numbers per trained or evaluated query. Pure: NumPy in, numbers out.

A line says which record it was, which branch its tokens went through, the sum of its token losses, and what the router
thought of it. Sums over lines do not care how rows were batched, accumulated or spread over ranks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...branch import Branch

# Columns of a line, float32. `PROBABILITY` is P(thinking) in [0, 1]; NaN where the router did not run.
RECORD, BRANCH, LABEL, TOKENS, LM_SUM, ROUTER_LOSS, PROBABILITY = range(7)
NUM_COLUMNS = 7

ECE_BINS = 15  # Guo et al., 2017


def summarize(lines: NDArray[np.floating], sources: Sequence[str], router_loss_weight: float) -> dict[str, float]:
    """Return everything that these queries say; what they say nothing about is left out.

    Args:
        lines: (Q, 7), one line per query.
        sources: (Q,), where each query comes from.
    Returns:
        loss, lm_loss (nats per supervised token), lm_loss_thinking, lm_loss_non_thinking, router_loss (nats per labelled
        query), router_accuracy, router_auc, router_ece, thinking_ratio, thinking_ratio/<source> (the router's own
        decision at 0.5, in [0, 1]).
    """
    table: NDArray[np.float64] = np.asarray(lines, dtype=np.float64)
    report = _lm(table)
    is_routed = ~np.isnan(table[:, PROBABILITY])
    routed = table[is_routed]
    labelled = routed[routed[:, LABEL] >= 0]
    if len(labelled):
        is_thinking = labelled[:, LABEL] == Branch.THINKING
        probability = labelled[:, PROBABILITY]
        report["router_loss"] = float(labelled[:, ROUTER_LOSS].mean())
        report["router_accuracy"] = float(((probability >= 0.5) == is_thinking).mean())
        area = auc(probability, is_thinking)
        if area is not None:
            report["router_auc"] = area
        report["router_ece"] = expected_calibration_error(probability, is_thinking)
    parts = [value for value in (report.get("lm_loss"), report.get("router_loss")) if value is not None]
    if parts:
        report["loss"] = report.get("lm_loss", 0.0) + router_loss_weight * report.get("router_loss", 0.0)
    if len(routed):
        report.update(
            _thinking_ratios(routed, [source for source, is_in in zip(sources, is_routed, strict=True) if is_in])
        )
    return report


def auc(score: NDArray[np.floating], is_positive: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counted half.

    AUC = (sum of the positives' average ranks - n_pos (n_pos + 1) / 2) / (n_pos n_neg)    (Mann-Whitney)

    Returns:
        A number in [0, 1], or None where one of the classes is missing.
    """
    positives = int(is_positive.sum())
    negatives = len(score) - positives
    if positives == 0 or negatives == 0:
        return None
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    average_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = average_rank[place][is_positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def expected_calibration_error(
    probability: NDArray[np.floating], is_positive: NDArray[np.bool_], bins: int = ECE_BINS
) -> float:
    """Mean gap between confidence and accuracy, over equally wide bins of the confidence in the chosen class.

    ECE = sum_b (n_b / n) |accuracy_b - confidence_b|,  bins (k / bins, (k + 1) / bins]

    Source: Guo et al., On Calibration of Modern Neural Networks (2017).
    """
    choice = probability >= 0.5
    confidence = np.where(choice, probability, 1.0 - probability)
    is_right = choice == is_positive
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    gaps = [abs(is_right[place == index].sum() - confidence[place == index].sum()) for index in range(bins)]
    return float(sum(gaps) / len(probability))


def _lm(lines: NDArray[np.float64]) -> dict[str, float]:
    report = {}
    for name, chosen in (
        ("lm_loss", lines),
        ("lm_loss_thinking", lines[lines[:, BRANCH] == Branch.THINKING]),
        ("lm_loss_non_thinking", lines[lines[:, BRANCH] == Branch.NON_THINKING]),
    ):
        tokens = chosen[:, TOKENS].sum()
        if tokens:
            report[name] = float(chosen[:, LM_SUM].sum() / tokens)
    return report


def _thinking_ratios(lines: NDArray[np.float64], sources: Sequence[str]) -> dict[str, float]:
    thinks = lines[:, PROBABILITY] >= 0.5
    names = np.asarray(sources)
    report = {"thinking_ratio": float(thinks.mean())}
    for name in sorted(set(sources)):
        report[f"thinking_ratio/{name}"] = float(thinks[names == name].mean())
    return report
