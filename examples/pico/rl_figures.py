"""The plots of the study of Stage-RL, drawn from its report alone."""

import math
from pathlib import Path
from typing import Any

from .figures import save, subplots

FAMILIES = ("reasoning", "direct")
STATES = ("start", "GRPO", "random reward")
COLOR = {"start": "#9d9da1", "GRPO": "#54a24b", "random reward": "#e45756"}
Report = dict[str, Any]


def draw(report: Report, folder: Path) -> list[Path]:
    """Write study-rl-{accuracy,curves,rise}.png and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [accuracy(report, folder), curves(report, folder), rise(report, folder)]


def accuracy(report: Report, folder: Path) -> Path:
    """Held-out greedy accuracy of each family: bars are means over seeds, dots seeds with 95 % intervals."""
    figure, axes = subplots(2, width=9)
    groups = {
        "start": [run["before"] for run in report["seeds"]],
        "GRPO": [run["after"] for run in report["seeds"]],
        "random reward": [run["after"] for run in report["controls"]],
    }
    for panel, family in enumerate(FAMILIES):
        for place, state in enumerate(STATES):
            values = [measured["families"][family] for measured in groups[state]]
            axes[panel].bar(place, sum(v["value"] for v in values) / len(values), 0.6, color=COLOR[state], alpha=0.55)
            for number, value in enumerate(values):
                at = place + (number - (len(values) - 1) / 2) * 0.14
                spread = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
                axes[panel].errorbar(at, value["value"], spread, fmt="o", color="black", markersize=3, capsize=2)
        axes[panel].set_xticks(range(len(STATES)), STATES)
        axes[panel].set_ylim(0, 1)
        axes[panel].set_title(f"{family}: greedy accuracy, held-out images")
    return save(figure, folder / "study-rl-accuracy.png")


def curves(report: Report, folder: Path) -> Path:
    """What one watches while it trains: accuracy of the sampled answers, entropy, length."""
    figure, axes = subplots(3, width=12)
    shown = {
        "rewards/accuracy_reward/mean": "accuracy of sampled answers\n(prompts that were drawn, dropped ones too)",
        "entropy": "entropy, nats per token\n(prompts that teach something)",
        "length/mean": "tokens per sampled answer",
    }
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        for state, runs in (("GRPO", report["seeds"]), ("random reward", report["controls"])):
            for number, run in enumerate(runs):
                found = run["curves"]
                label = state if number == 0 else None
                axis.plot(found["step"], _smooth(found[name]), color=COLOR[state], alpha=0.8, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step (mean of 5)")
    axes[0].legend()
    return save(figure, folder / "study-rl-curves.png")


def rise(report: Report, folder: Path) -> Path:
    """The pipeline: pass rates after RL, and what the two-branch model does at the end."""
    figure, axes = subplots(3, width=12)
    summary = report["rise"]["summary"]
    counts = summary["sft_set"]["histogram"]
    bins = len(counts) - 2
    names = ["0", *[f".{low}" for low in range(bins)], "1"]
    colors = ["#e45756", *["#4c78a8"] * bins, "#9d9da1"]
    axes[0].bar(range(len(counts)), counts, color=colors)
    axes[0].set_xticks(range(len(counts)), names, fontsize=8)
    axes[0].set_title("prompts by pass rate after RL\n(expert | self-distilled | dropped)", fontsize=10)
    for axis, value, title in (
        (axes[1], lambda mode: mode["accuracy"]["value"], "accuracy, held-out images"),
        (axes[2], lambda mode: mode["mean_tokens"], "tokens per answer"),
    ):
        modes = summary["modes"]
        axis.bar(list(modes), [value(mode) for mode in modes.values()], color=["#54a24b", "#e45756", "#4c78a8"])
        axis.set_title(f"{title}\nafter Stage-SFT, by thinking mode", fontsize=10)
    return save(figure, folder / "study-rl-rise.png")


def _smooth(values: list[float | None], width: int = 5) -> list[float]:
    """Mean over the last `width` steps that have a value; a step without prompts that teach has no entropy."""
    parts = ([v for v in values[max(0, end - width) : end] if v is not None] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) if part else math.nan for part in parts]
