"""A report as tables for a terminal or a log file."""

from typing import TYPE_CHECKING

from .metrics import Difference, Proportion
from .report import ALL, EvaluationReport, Group

if TYPE_CHECKING:
    from rich.console import Console

# Settings that every report shows: they move results by points.
_SHOWN = ("verifier", "system_prompt_sha256", "min_pixels", "max_pixels", "max_new_tokens", "threshold", "decoding")
_ALSO = ("repetition_penalty", "dtype", "attention")


def print_report(report: EvaluationReport, console: "Console") -> None:
    """Print results per mode and source, the comparisons, the router, and what it was measured with."""
    from rich.table import Table
    from rich.text import Text

    has_branches = bool(report.model["routes"])
    table = Table(title=f"{report.model['name']} on {report.data['name']}", title_justify="left")
    for name in ("mode", "source"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", "accuracy", "95 %", "unscored", "thinking" if has_branches else "reasoned"):
        table.add_column(name, justify="right")
    for name in ("tokens", "tokens / correct", "seconds", "finished"):
        table.add_column(name, justify="right")
    for mode, found in report.modes.items():
        groups = {**(found.sources if len(found.sources) > 1 else {}), ALL: found.all}
        for source, group in groups.items():
            table.add_row(mode, source, *_cells(group, has_branches), end_section=source == ALL)
    console.print(table)
    for mode, found in report.modes.items():
        if len(found.sources) > 1 and found.mean_accuracy is not None:
            console.print(f"{mode}: mean of the sources' accuracies {found.mean_accuracy:.4f}", highlight=False)

    if report.comparisons:
        table = Table(title="auto against always (on) and never (off) thinking", title_justify="left")
        for name in ("against", "source"):
            table.add_column(name, no_wrap=True)
        for name in ("rows", "accuracy gained", "95 %", "tokens saved", "seconds saved"):
            table.add_column(name, justify="right")
        for item in report.comparisons:
            table.add_row(
                item.against,
                item.source,
                str(item.rows),
                _signed(item.accuracy.value),
                _interval(item.accuracy, sign=True),
                _percent(item.tokens_saved),
                _percent(item.seconds_saved),
            )
        console.print(table)

    if report.router:
        table = Table(title="the router against the rows' modes", title_justify="left")
        table.add_column("source", no_wrap=True)
        for name in ("rows", "accuracy", "95 %", "AUC", "ECE", "right think", "wrong think", "missed", "right direct"):
            table.add_column(name, justify="right")
        for source, router in report.router.items():
            (direct, wrong), (missed, right) = router.confusion
            table.add_row(
                source,
                str(router.rows),
                _number(router.accuracy.value),
                _interval(router.accuracy),
                _number(router.auc),
                _number(router.calibration_error),
                *(str(count) for count in (right, wrong, missed, direct)),
            )
        console.print(table)

    for note in report.notes:
        console.print(Text(f"note: {note}"))
    for line in provenance_lines(report):
        console.print(Text(line))


def provenance_lines(report: EvaluationReport) -> list[str]:
    """What the numbers were made with, one thing per line."""
    settings = report.settings
    shown = {name: settings[name] for name in (*_SHOWN, *_ALSO) if settings.get(name) is not None}
    versions: dict[str, str] = report.environment["versions"]  # type: ignore[assignment]
    return [
        *(f"{name.replace('_', ' ')}: {value}" for name, value in shown.items()),
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"hardware: {report.environment['hardware']}",
    ]


def _cells(group: Group, has_branches: bool) -> list[str]:
    return [
        str(group.rows),
        _number(group.accuracy.value),
        _interval(group.accuracy),
        str(group.unscored),
        _percent(group.thinking.value if group.thinking is not None and has_branches else group.reasoned.value),
        _number(group.mean_tokens, 1),
        _number(group.tokens_per_correct, 1),
        _number(group.mean_seconds, 3),
        _percent(group.finished.value),
    ]


def _interval(found: Proportion | Difference, *, sign: bool = False) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"{found.low:+.3f} … {found.high:+.3f}" if sign else f"{found.low:.3f} … {found.high:.3f}"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
