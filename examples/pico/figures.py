"""The plots of the study, drawn from its report alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODES = ("off", "auto", "on")
COLOR = {"off": "#4c78a8", "auto": "#54a24b", "on": "#e45756"}
Report = dict[str, Any]


def draw(report: Report, folder: Path) -> list[Path]:
    """Write study-sft-{modes,router,pooling}.png and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [modes(report, folder), router(report, folder), pooling(report, folder)]


def modes(report: Report, folder: Path) -> Path:
    """Accuracy and tokens of each family and mode: bars are means over seeds, dots seeds with 95 % intervals."""
    figure, axes = subplots(2, width=10)
    families = ("direct", "reasoning")
    for place, mode in enumerate(MODES):
        for panel, value_of in enumerate((_accuracy, _tokens)):
            for x, family in enumerate(families):
                values = [
                    value_of(seed[report["pooling"]]["test"]["families"][family][mode]) for seed in report["seeds"]
                ]
                left = x + (place - 1) * 0.27
                height = sum(value for value, _, _ in values) / len(values)
                label = mode if x == 0 else None
                axes[panel].bar(left, height, 0.25, color=COLOR[mode], alpha=0.55, label=label)
                for number, (value, low, high) in enumerate(values):
                    at = left + (number - (len(values) - 1) / 2) * 0.06
                    axes[panel].errorbar(
                        at, value, [[value - low], [high - value]], fmt="o", color=COLOR[mode], markersize=3, capsize=2
                    )
    for axis, title in zip(axes, ("accuracy, held-out images", "generated tokens per query"), strict=True):
        axis.set_xticks(range(len(families)), families)
        axis.set_title(title)
    axes[0].legend(title="thinking", loc="lower left")
    return save(figure, folder / "study-sft-modes.png")


def router(report: Report, folder: Path) -> Path:
    """Router accuracy while Stage-SFT trains, and on held-out queries beside what the words alone give."""
    figure, axes = subplots(2, width=10)
    for seed in report["seeds"]:
        curves = seed[report["pooling"]]["curves"]
        axes[0].plot(curves["step"], curves["router_accuracy"], color=COLOR["auto"], label=f"seed {seed['seed']}")
    curves = report["control"]["control"]["curves"]
    axes[0].plot(curves["step"], curves["router_accuracy"], color="gray", label="control: modes dealt out at random")
    axes[0].set_title("router accuracy on training batches")
    axes[0].set_xlabel("step")
    axes[0].legend()
    bars = {
        "Stage-SFT": [seed[report["pooling"]]["test"]["router"]["accuracy"]["value"] for seed in report["seeds"]],
        "held-out\ntemplates": [
            seed[report["pooling"]]["templates"]["router"]["accuracy"]["value"] for seed in report["seeds"]
        ],
        "router on\nwords": [seed["router_text_only"]["router_accuracy"] for seed in report["seeds"]],
        "TF-IDF": [report["shared"]["test"]],
        "control": [report["control"]["control"]["test"]["router"]["accuracy"]["value"]],
    }
    _dots(axes[1], bars)
    axes[1].set_title("router accuracy on held-out queries")
    axes[1].axhline(0.98, color="black", linewidth=0.8, linestyle=":")
    return save(figure, folder / "study-sft-router.png")


def pooling(report: Report, folder: Path) -> Path:
    """Mean against attention pooling: errors of the router, trained alone and within Stage-SFT."""
    figure, axes = subplots(1, width=5.5)
    bars: dict[str, list[float]] = {}
    for name in ("mean", "attention"):
        alone = [1 - seed["router_alone"][name]["router_accuracy"] for seed in report["seeds"]]
        trained = [1 - seed[name]["test"]["router"]["accuracy"]["value"] for seed in report["seeds"]]
        bars |= {f"{name}\nfrozen features": alone, f"{name}\nStage-SFT": trained}
    _dots(axes[0], bars)
    axes[0].set_title("router errors on held-out queries (share)")
    return save(figure, folder / "study-sft-pooling.png")


def _dots(axes: "Axes", bars: dict[str, list[float]]) -> None:
    for x, values in enumerate(bars.values()):
        axes.bar(x, sum(values) / len(values), 0.6, color=COLOR["auto"], alpha=0.4)
        axes.plot([x] * len(values), values, "o", color="black", markersize=4)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=8)


def _accuracy(group: Report) -> tuple[float, float, float]:
    found = group["accuracy"]
    return found["value"], found["low"], found["high"]


def _tokens(group: Report) -> tuple[float, float, float]:
    return (group["mean_tokens"],) * 3


def subplots(columns: int, *, width: float):
    """A figure with `columns` panels side by side, and the panels."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, 3.6), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def save(figure, path: Path) -> Path:
    """Write a figure and close it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
