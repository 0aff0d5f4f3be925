"""The report of an SFT set: a table, JSON and a picture."""

import dataclasses
from pathlib import Path

from metis_home.errors import TrainingError

from .sft_set import BINS, SftSetReport


def report_lines(report: SftSetReport) -> list[str]:
    """A table for people."""
    rows = [
        ("prompts", report.prompts, ""),
        ("p = 1", report.solved, "dropped"),
        ("0 < p < 1", report.sometimes, f"{report.self_distilled} rows of the model's own"),
        ("p = 0", report.never, f"{report.expert} rows of the expert's"),
        ("not judged", report.unjudged, "dropped"),
        ("held out", report.held_out, "asked again in --exclude, dropped"),
        ("direct", report.non_thinking, "non-thinking rows mixed in"),
        ("rows", report.rows, f"{report.thinking} thinking, {report.non_thinking} non-thinking"),
    ]
    notes = {
        "correct answers in a wrong format": report.badly_formatted,
        "correct answers that repeat another": report.duplicates,
        "0 < p < 1 without a usable answer": report.sometimes_without_row,
        "p = 0 without an expert answer": report.expert_missing,
        "p = 0 with wrong expert answers only": report.expert_wrong,
        "p = 0 with correct expert answers in a wrong format only": report.expert_badly_formatted,
        "prompts without a pass rate, left out": report.without_rate,
    }
    lines = [f"{name:12} {count:7}  {note}".rstrip() for name, count, note in rows]
    return lines + [f"  {count} {note}" for note, count in notes.items() if count]


def report_json(report: SftSetReport) -> dict[str, object]:
    """All numbers."""
    return {**dataclasses.asdict(report), "thinking": report.thinking, "rows": report.rows}


def draw_histogram(report: SftSetReport, path: Path) -> None:
    """Draw how many prompts have which pass rate, as PNG.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError('plots need matplotlib: pip install "metis_home[train]"') from error
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    names = ["0", *[f"{low / BINS:.1f}–{(low + 1) / BINS:.1f}" for low in range(BINS)], "1"]
    colours = ["#c44e52", *["#4c72b0"] * BINS, "#999999"]
    bars = axes.bar(names, report.histogram, color=colours)
    axes.bar_label(bars, [str(count) if count else "" for count in report.histogram], fontsize=8)
    axes.set(xlabel="pass rate p", ylabel="prompts", title="expert answers   |   own answers   |   dropped")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
