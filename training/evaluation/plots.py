"""Pictures of a report, as PNG files: modes side by side, the router, and accuracy against tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_home.errors import MetisHomeError

from .completions import Completion
from .report import ALL, EvaluationReport, Group
from .tradeoff import Outcome, Query, trade_off

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLOURS = {"auto": "#0072B2", "on": "#D55E00", "off": "#009E73"}
_NAMES = {"auto": "auto", "on": "always thinking", "off": "never thinking"}
_THINKING, _DIRECT, _PICKED = "#D55E00", "#009E73", "#CC79A7"


class PlotError(MetisHomeError, ImportError):
    """matplotlib is not installed."""


def draw_report(report: EvaluationReport, directory: Path) -> list[Path]:
    """Draw what the report allows: `modes.png`, `router.png` (labelled rows), `tradeoff.png` (both forced modes).

    Raises:
        PlotError: matplotlib is not installed.
    """
    drawn = [_save(modes_figure(report), directory / "modes.png")]
    if report.router:
        drawn.append(_save(router_figure(report), directory / "router.png"))
    queries = queries_of(report.completions)
    if queries:
        marks = {
            _NAMES[mode]: (found.all.mean_tokens, found.all.accuracy.value) for mode, found in report.modes.items()
        }
        drawn.append(_save(tradeoff_figure(trade_off(queries), marks=marks), directory / "tradeoff.png"))
    return drawn


def queries_of(completions: Sequence[Completion]) -> list[Query]:
    """The rows that both branches answered, as the trade-off reads them."""
    by_mode: dict[str, dict[str, Completion]] = {"auto": {}, "on": {}, "off": {}}
    for row in completions:
        by_mode[row.thinking][row.id] = row
    return [
        Query(
            thinking_probability=thought.thinking_probability,
            tokens=(by_mode["off"][id].tokens, thought.tokens),
            correct=(by_mode["off"][id].correct, thought.correct),
        )
        for id, thought in by_mode["on"].items()
        if id in by_mode["off"] and thought.thinking_probability is not None
    ]


def modes_figure(report: EvaluationReport) -> "Figure":
    """Accuracy (95 % intervals), tokens per answer and thinking ratio: a row for each source, a bar for each mode."""
    sources = list(dict.fromkeys(source for found in report.modes.values() for source in found.sources))
    groups = [*sources, ALL] if len(sources) > 1 else [ALL]
    thickness = 0.8 / len(report.modes)
    figure, axes = _subplots(3, width=11.0, height=1.6 + 0.2 * len(groups) * (len(report.modes) + 1))
    for axis, title in zip(axes, ("accuracy", "tokens per answer", "thinking ratio"), strict=True):
        axis.set_title(title)
        axis.set_yticks(range(len(groups)), groups if axis is axes[0] else [""] * len(groups))
        axis.set_ylim(len(groups) - 0.5, -0.5)  # the first source on top
    for place, (mode, found) in enumerate(report.modes.items()):
        at = [index + (place - (len(report.modes) - 1) / 2) * thickness for index in range(len(groups))]
        members = [found.all if name == ALL else found.sources.get(name) for name in groups]
        style: dict[str, Any] = {"height": thickness, "color": _COLOURS[mode], "label": _NAMES[mode]}
        accuracy = [None if group is None else group.accuracy for group in members]
        lengths = [0.0 if share is None or share.value is None else share.value for share in accuracy]
        spread = [
            (0.0, 0.0)
            if share is None or share.value is None or share.low is None or share.high is None
            else (share.value - share.low, share.high - share.value)
            for share in accuracy
        ]
        axes[0].barh(at, lengths, xerr=list(zip(*spread, strict=True)), capsize=2, ecolor="#444", **style)
        axes[1].barh(at, [0.0 if group is None else group.mean_tokens or 0.0 for group in members], **style)
        axes[2].barh(at, [_ratio(group) for group in members], **style)
    axes[0].set_xlim(0, 1.05)
    axes[2].set_xlim(0, 1.05)
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def router_figure(report: EvaluationReport) -> "Figure":
    """How P(thinking) is distributed for each label, and whether it can be believed."""
    router = report.router[ALL]
    queries = {row.id: row for row in report.completions if row.label and row.thinking_probability is not None}
    figure, (left, right) = _subplots(2, width=9.0)
    edges = [step / 20 for step in range(21)]
    for label, colour in (("non-thinking", _DIRECT), ("thinking", _THINKING)):
        chances = [row.thinking_probability for row in queries.values() if row.label == label]
        values = [chance for chance in chances if chance is not None]
        left.hist(values, bins=edges, color=colour, alpha=0.65, label=f"should be {label} ({len(values)})")
    left.axvline(router.threshold, color="#444", linestyle="--", linewidth=1, label=f"threshold {router.threshold:.3g}")
    left.set(title="the router's confidence", xlabel="P(thinking)", ylabel="queries", xlim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    bins = [
        (found.mean_probability, found.thinking_share, found.rows)
        for found in router.bins
        if found.mean_probability is not None and found.thinking_share is not None
    ]
    right.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
    largest = max((rows for *_, rows in bins), default=1)
    right.scatter(
        [chance for chance, *_ in bins],
        [share for _, share, _ in bins],
        s=[20 + 180 * rows / largest for *_, rows in bins],
        color=_COLOURS["auto"],
        alpha=0.8,
    )
    error = "" if router.calibration_error is None else f"ECE {router.calibration_error:.3f}"
    auc = "" if router.auc is None else f", AUC {router.auc:.3f}"
    right.set(
        title=f"reliability: {error}{auc}",
        xlabel="mean P(thinking) of a bin",
        ylabel="share that should think",
        xlim=(-0.03, 1.03),
        ylim=(-0.05, 1.05),
    )
    return figure


def tradeoff_figure(
    curve: Sequence[Outcome],
    *,
    picked: Outcome | None = None,
    marks: dict[str, tuple[float | None, float | None]] | None = None,
) -> "Figure":
    """Accuracy against tokens over all thresholds, and what each threshold does.

    Args:
        picked: the outcome that was chosen.
        marks: further points (mean tokens, accuracy), by name, such as the modes that were run.
    """
    figure, (left, right) = _subplots(2, width=11.0)
    scored = [found for found in curve if found.accuracy is not None]
    accuracy = [found.accuracy for found in scored if found.accuracy is not None]
    left.plot([found.mean_tokens for found in scored], accuracy, color="#999", linewidth=1)
    points = left.scatter(
        [found.mean_tokens for found in scored],
        accuracy,
        c=[found.thinking_ratio for found in scored],
        cmap="viridis",
        vmin=0,
        vmax=1,
        s=14,
        zorder=3,
    )
    figure.colorbar(points, ax=left, label="thinking ratio")
    colours = {name: _COLOURS[mode] for mode, name in _NAMES.items()}
    for name, (tokens, height) in (marks or {}).items():
        if tokens is not None and height is not None:
            left.scatter([tokens], [height], marker="D", s=45, color=colours.get(name, "#444"), label=name, zorder=4)
    left.set(title="every threshold: accuracy against cost", xlabel="mean tokens per answer", ylabel="accuracy")

    thresholds = [found.threshold for found in curve]
    right.step(
        thresholds, [found.thinking_ratio for found in curve], where="mid", color=_THINKING, label="thinking ratio"
    )
    if scored:
        right.step(
            [found.threshold for found in scored],
            accuracy,
            where="mid",
            color=_COLOURS["auto"],
            label="accuracy",
        )
    right.set(title="what a threshold does", xlabel="router_threshold", xlim=(0, 1), ylim=(-0.03, 1.05))
    tokens_axis = right.twinx()
    tokens_axis.step(thresholds, [found.mean_tokens for found in curve], where="mid", color="#777", linestyle=":")
    tokens_axis.set_ylabel("mean tokens per answer (dotted)")
    tokens_axis.set_ylim(bottom=0)
    if picked is not None:
        if picked.accuracy is not None:
            left.scatter(
                [picked.mean_tokens], [picked.accuracy], marker="*", s=200, color="#CC79A7", zorder=5, label="picked"
            )
        right.axvline(picked.threshold, color=_PICKED, label=f"picked {picked.threshold:.4g}")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def save_tradeoff(curve: Sequence[Outcome], picked: Outcome, path: Path) -> Path:
    """Draw the trade-off with the picked outcome into a PNG file.

    Raises:
        PlotError: matplotlib is not installed.
    """
    return _save(tradeoff_figure(curve, picked=picked), path)


def _ratio(group: Group | None) -> float:
    if group is None:
        return 0.0
    return (group.thinking or group.reasoned).value or 0.0


def _subplots(columns: int, *, width: float, height: float = 4.0) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(f'plots need matplotlib: pip install "metis_home[train]" ({error})') from error
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state, no display
    axes = figure.subplots(1, columns)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _save(figure: "Figure", path: Path) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)
    return path
