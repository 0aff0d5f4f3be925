"""Two pictures of a router that is trained by reward: where its probabilities lie, and how right each branch was there."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from metis_home.branch import Branch

from .branch_metrics import BINS

_MIDDLES = (np.arange(len(BINS)) + 0.5) / len(BINS)


def draw_router(history: Sequence[Mapping[str, float]], folder: Path) -> list[Path]:
    """Draw router_confidence.png and router_calibration.png from the Trainer's log; nothing where no branch was drawn.

    Returns:
        The files.
    """
    entries = [entry for entry in history if any(name.startswith("router/p_thinking/") for name in entry)]
    if not entries:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = np.array([[entry.get(f"router/p_thinking/{name}", 0) for name in BINS] for entry in entries])
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [entry["step"] for entry in entries]
    image = axes.pcolormesh(steps, _MIDDLES, shares.T, shading="nearest", vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="share of rollouts")
    axes.set(title="the router's probability of thinking", xlabel="optimizer step", ylabel="p(thinking)")
    axes.set_yticks(np.arange(0, 1.1, 0.2))
    confidence = folder / "router_confidence.png"
    figure.savefig(confidence, dpi=110)

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for branch in Branch:
        found = [[entry.get(f"router/accuracy/{branch.label}/{name}") for entry in entries] for name in BINS]
        points = [
            (middle, float(np.mean(values)))
            for middle, column in zip(_MIDDLES, found, strict=True)
            if (values := [value for value in column if value is not None])
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"answered {branch.label}", marker="o")
    axes.set(
        title="accuracy where the router gave that probability (mean of the log)",
        xlabel="p(thinking)",
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(-0.02, 1.02),
    )
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    calibration = folder / "router_calibration.png"
    figure.savefig(calibration, dpi=110)
    return [confidence, calibration]
