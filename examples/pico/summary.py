"""What the answers of the study add up to, and whether they meet the goals."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from metis_home.training.evaluation.metrics import confusion, paired_difference, proportion, roc_auc

from .families import FAMILY_OF

if TYPE_CHECKING:
    from metis_home.training.evaluation.completions import Completion

FAMILIES = ("direct", "reasoning")
ROUTER_ACCURACY = 0.98
WITHIN = 0.01  # of the better fixed mode
TOKENS_SAVED = 0.40


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One goal: what was measured against what is wanted."""

    name: str
    found: float
    wanted: str
    met: bool


def summarize(completions: Iterable["Completion"]) -> dict[str, object]:
    """Accuracy and tokens per family, source and mode; the router; auto against the fixed modes, paired by query."""
    rows = list(completions)
    modes = sorted({row.thinking for row in rows})
    found: dict[str, object] = {"families": {}, "sources": {}}
    for level, group_of in (("families", _family), ("sources", lambda row: row.source)):
        for name in sorted({group_of(row) for row in rows}):
            of_group = [row for row in rows if group_of(row) == name]
            found[level][name] = {mode: _group([row for row in of_group if row.thinking == mode]) for mode in modes}
    if any(row.thinking_probability is not None for row in rows):
        found["router"] = _router([row for row in rows if row.thinking == "auto"])
    if {"auto", "on", "off"} <= set(modes):
        found["auto_minus_better"] = {family: _auto_minus_better(rows, family) for family in FAMILIES}
        totals = {mode: sum(row.tokens for row in rows if row.thinking == mode) for mode in modes}
        found["tokens_saved"] = 1 - totals["auto"] / totals["on"]
    return found


def judge(summary: dict, text_only: float) -> list[Criterion]:
    """The goals of Stage-SFT for one seed. `text_only`: accuracy of the best router that sees no image."""
    accuracy = summary["router"]["accuracy"]["value"]
    goals = [
        Criterion(
            name="router accuracy", found=accuracy, wanted=f">= {ROUTER_ACCURACY}", met=accuracy >= ROUTER_ACCURACY
        ),
        Criterion(
            name="router minus text-only router",
            found=accuracy - text_only,
            wanted="> 0",
            met=accuracy > text_only,
        ),
    ]
    for family in FAMILIES:
        gap = summary["auto_minus_better"][family]["value"]
        goals.append(
            Criterion(name=f"{family}: auto minus better mode", found=gap, wanted=f">= -{WITHIN}", met=gap >= -WITHIN)
        )
    saved = summary["tokens_saved"]
    goals.append(
        Criterion(
            name="tokens saved against thinking", found=saved, wanted=f">= {TOKENS_SAVED}", met=saved >= TOKENS_SAVED
        )
    )
    return goals


def _family(row: "Completion") -> str:
    return FAMILY_OF[row.source]


def _group(rows: list["Completion"]) -> dict[str, object]:
    return {
        "accuracy": asdict(proportion(sum(bool(row.correct) for row in rows), len(rows))),
        "mean_tokens": sum(row.tokens for row in rows) / max(1, len(rows)),
        "finished": sum(row.finished for row in rows) / max(1, len(rows)),
        "thinking_ratio": sum(row.branch == "thinking" for row in rows) / max(1, len(rows)),
    }


def _router(rows: list["Completion"]) -> dict[str, object]:
    should = [row.label == "thinking" for row in rows]
    does = [row.branch == "thinking" for row in rows]
    right = sum(a == b for a, b in zip(does, should, strict=True))
    probabilities = [float(row.thinking_probability or 0.0) for row in rows]
    return {
        "accuracy": asdict(proportion(right, len(rows))),
        "auc": roc_auc(probabilities, should),
        "confusion": confusion(does, should),
    }


def _auto_minus_better(rows: list["Completion"], family: str) -> dict[str, object]:
    correct = {
        mode: {row.id: float(bool(row.correct)) for row in rows if row.thinking == mode and _family(row) == family}
        for mode in ("auto", "on", "off")
    }
    better = max(("on", "off"), key=lambda mode: sum(correct[mode].values()))
    ids = sorted(correct["auto"])
    difference = paired_difference([correct["auto"][i] for i in ids], [correct[better][i] for i in ids])
    return {"better": better, **asdict(difference)}
