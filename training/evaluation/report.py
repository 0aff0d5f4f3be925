"""What the answers of a run add up to, as data: per mode and source, the router, and modes against each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from .completions import MODES, Completion, Mode
from .metrics import (
    Difference,
    Proportion,
    ReliabilityBin,
    confusion,
    mean,
    paired_difference,
    proportion,
    reliability,
    roc_auc,
    thinks,
)

ALL = "all"  # the group that holds every source
_THINKING = "thinking"
Against = Literal["on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows of one source, or of all, answered in one mode."""

    rows: int
    accuracy: Proportion
    """Over the rows that could be judged."""
    unscored: int
    """Rows without a verdict: no gold answer, or one that nothing can be compared with."""
    thinking: Proportion | None
    """Rows that the thinking branch answered; None for a dense model."""
    reasoned: Proportion
    """Answers that hold reasoning: for a dense model the only thinking ratio there is."""
    finished: Proportion
    """Answers that the model ended itself."""
    tokens: int
    mean_tokens: float | None
    tokens_per_correct: float | None
    """All tokens, of wrong answers too, per correct answer."""
    seconds: float
    mean_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeReport:
    """One mode: every source, all rows, and the plain average of the sources' accuracies."""

    sources: dict[str, Group]
    all: Group
    mean_accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """The router against the rows' own modes, over the rows that have one."""

    rows: int
    threshold: float
    accuracy: Proportion
    confusion: tuple[tuple[int, int], tuple[int, int]]
    """[label][decision], 0 = non-thinking, 1 = thinking."""
    auc: float | None
    calibration_error: float | None
    bins: list[ReliabilityBin]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Mode "auto" against a forced mode, on the rows that both answered."""

    against: Against
    source: str
    rows: int
    accuracy: Difference
    """auto - forced, over the rows with a verdict on both."""
    tokens_saved: float | None
    """1 - tokens of auto / tokens of the forced mode; negative where auto wrote more."""
    seconds_saved: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Everything that was measured, and with what."""

    model: dict[str, object]
    data: dict[str, object]
    settings: dict[str, object]
    environment: dict[str, object]
    modes: dict[str, ModeReport]
    router: dict[str, RouterReport]
    """By source, and "all"; empty for a dense model, or where no row has a mode."""
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, object]:
        """What `report.json` holds: all but the completions."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "completions"}
        return {name: _plain(value) for name, value in found.items()}


def mode_reports(completions: Iterable[Completion]) -> dict[str, ModeReport]:
    """Sum up each mode that has answers, in the order auto, on, off."""
    rows = list(completions)
    found: dict[str, ModeReport] = {}
    for mode in MODES:
        by_source = _by_source([row for row in rows if row.thinking == mode])
        if by_source:
            sources = {source: group(members) for source, members in by_source.items()}
            accuracies = [made.accuracy.value for made in sources.values() if made.accuracy.value is not None]
            everything = [row for members in by_source.values() for row in members]
            found[mode] = ModeReport(sources=sources, all=group(everything), mean_accuracy=mean(accuracies))
    return found


def group(rows: Sequence[Completion]) -> Group:
    """Sum up rows of one mode."""
    scored = [row for row in rows if row.correct is not None]
    correct = sum(bool(row.correct) for row in scored)
    tokens, seconds = sum(row.tokens for row in rows), sum(row.seconds + row.router_seconds for row in rows)
    has_branches = bool(rows) and all(row.branch is not None for row in rows)
    return Group(
        rows=len(rows),
        accuracy=proportion(correct, len(scored)),
        unscored=len(rows) - len(scored),
        thinking=proportion(sum(row.branch == _THINKING for row in rows), len(rows)) if has_branches else None,
        reasoned=proportion(sum(bool(row.reasoning) for row in rows), len(rows)),
        finished=proportion(sum(row.finished for row in rows), len(rows)),
        tokens=tokens,
        mean_tokens=tokens / len(rows) if rows else None,
        tokens_per_correct=sum(row.tokens for row in scored) / correct if correct else None,
        seconds=seconds,
        mean_seconds=seconds / len(rows) if rows else None,
    )


def router_reports(completions: Iterable[Completion], threshold: float) -> dict[str, RouterReport]:
    """Judge the router by source and over all, each query once, whatever modes it was answered in."""
    queries = {row.id: row for row in completions if row.thinking_probability is not None and row.label is not None}
    by_source = _by_source(list(queries.values()))
    if len(by_source) > 1:
        by_source = {**by_source, ALL: list(queries.values())}
    elif by_source:
        by_source = {ALL: list(queries.values())}
    return {source: _router_report(rows, threshold) for source, rows in by_source.items()}


def comparisons(completions: Iterable[Completion]) -> list[Comparison]:
    """Set auto against each forced mode: over all sources, then per source."""
    by_mode: dict[str, dict[str, Completion]] = {mode: {} for mode in MODES}
    for row in completions:
        by_mode[row.thinking][row.id] = row
    found = []
    modes: tuple[Against, ...] = ("on", "off")
    for against in modes:
        pairs = [(row, by_mode[against][row.id]) for row in by_mode["auto"].values() if row.id in by_mode[against]]
        sources = dict.fromkeys(row.source for row, _ in pairs)
        if pairs:
            found.append(_comparison(against, ALL, pairs))
        if len(sources) > 1:
            for source in sources:
                found.append(_comparison(against, source, [pair for pair in pairs if pair[0].source == source]))
    return found


def select(rows: Mapping[tuple[str, str], Completion], ids: Sequence[str], modes: Sequence[Mode]) -> list[Completion]:
    """The completions of these rows in these modes, mode by mode, in the order of `ids`."""
    return [rows[mode, id] for mode in modes for id in ids if (mode, id) in rows]


def _router_report(rows: Sequence[Completion], threshold: float) -> RouterReport:
    probability = [row.thinking_probability for row in rows if row.thinking_probability is not None]
    labelled = [row.label == _THINKING for row in rows]
    predicted = [thinks(value, threshold) for value in probability]
    error, bins = reliability(probability, labelled)
    agreed = sum(chosen == label for chosen, label in zip(predicted, labelled, strict=True))
    return RouterReport(
        rows=len(rows),
        threshold=threshold,
        accuracy=proportion(agreed, len(rows)),
        confusion=confusion(predicted, labelled),
        auc=roc_auc(probability, labelled),
        calibration_error=error,
        bins=bins,
    )


def _comparison(against: Against, source: str, pairs: Sequence[tuple[Completion, Completion]]) -> Comparison:
    judged = [(auto, forced) for auto, forced in pairs if auto.correct is not None and forced.correct is not None]
    return Comparison(
        against=against,
        source=source,
        rows=len(pairs),
        accuracy=paired_difference(
            [float(bool(auto.correct)) for auto, _ in judged], [float(bool(forced.correct)) for _, forced in judged]
        ),
        tokens_saved=_saved([(auto.tokens, forced.tokens) for auto, forced in pairs]),
        seconds_saved=_saved([(_seconds(auto), _seconds(forced)) for auto, forced in pairs]),
    )


def _saved(pairs: Sequence[tuple[float, float]]) -> float | None:
    spent = sum(forced for _, forced in pairs)
    return 1 - sum(auto for auto, _ in pairs) / spent if spent else None


def _seconds(row: Completion) -> float:
    return row.seconds + row.router_seconds


def _by_source(rows: Sequence[Completion]) -> dict[str, list[Completion]]:
    found: dict[str, list[Completion]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return found


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value  # type: ignore[call-overload]
