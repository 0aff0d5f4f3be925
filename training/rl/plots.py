"""The curves that tell whether reinforcement learning works, drawn from the Trainer's log."""

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from metis_home.errors import TrainingError

from .router_plots import draw_router

logger = logging.getLogger(__name__)

# file -> (title, [metrics]); a name ending in * takes all metrics that begin so.
PLOTS: dict[str, tuple[str, list[str]]] = {
    "reward": ("reward (mean)", ["reward", "rewards/*/mean"]),
    "accuracy": ("accuracy: rollouts, held-out prompts", ["accuracy", "eval_*accuracy", "eval_*pass@*"]),
    "reward_std": ("reward (standard deviation)", ["reward_std", "rewards/*/std"]),
    "pass_rate": ("share of prompts with none, some, all rollouts right", ["pass_rate/*"]),
    "groups": ("share of drawn prompts without signal", ["groups/zero_std_fraction"]),
    "rounds": ("rounds of drawing", ["groups/rounds"]),
    "entropy": ("entropy, nats per token", ["entropy", "router/entropy"]),
    "clipping": ("share of clipped tokens", ["clip/low", "clip/high"]),
    "divergence": ("KL to the sampling and to the initial policy, nats per token", ["kl/old", "kl/ref"]),
    "ratio": ("largest ratio of a token", ["ratio/max"]),
    "sampler_gap": ("log-probabilities of sampler and trainer, nats apart", ["sampler/gap", "sampler/gap_max"]),
    "length": ("tokens per answer", ["length/mean", "length/correct", "length/wrong", "length/max"]),
    "tokens_per_correct": ("tokens per right answer", ["tokens_per_correct", "eval_*tokens_per_correct"]),
    "branches_accuracy": ("accuracy by branch", ["accuracy/*"]),
    "branches_length": ("tokens per answer by branch", ["length/thinking", "length/non-thinking"]),
    "truncated": ("share of answers cut by the limit", ["length/truncated_fraction"]),
    "advantage": ("advantage", ["advantage/mean", "advantage/std", "advantage/abs"]),
    "gradient": ("gradient norm; loss", ["grad_norm", "loss"]),
    "speed": ("sampled tokens per second", ["rollout_tokens_per_second"]),
    "seconds": ("seconds per stage", ["seconds/*"]),
    "thinking": ("share of thinking answers, in all and by source", ["thinking_ratio", "thinking_ratio/*"]),
    "tool_calls": ("tool turns per answer", ["tool_calls"]),
    "tool_failures": ("share of tool calls that failed", ["tools/failures"]),
}


def draw_plots(history: Sequence[Mapping[str, float]], output_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw `output_dir`/plots/*.png; curves without values are left out.

    Returns:
        The files.
    Raises:
        TrainingError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(output_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (title, patterns) in PLOTS.items():
        curves = {metric: points for metric in _matching(history, patterns) if (points := curve(history, metric))}
        if not curves:
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for metric, points in curves.items():
            axes.plot([step for step, _ in points], [value for _, value in points], label=metric, marker=".")
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside lower center", ncols=3)  # never over the curves
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    written += draw_router(history, folder)
    logger.info("drew %d plots into %s", len(written), folder)
    return written


def require_matplotlib() -> None:
    """Raise unless plots can be drawn: better before training than after it.

    Raises:
        TrainingError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise TrainingError('plots need matplotlib: pip install "metis_home[train]", or set plots: false')


def curve(history: Sequence[Mapping[str, float]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of each log entry that has the metric."""
    return [(entry["step"], entry[metric]) for entry in history if metric in entry and "step" in entry]


def _matching(history: Sequence[Mapping[str, float]], patterns: Sequence[str]) -> list[str]:
    names = dict.fromkeys(name for entry in history for name in entry)
    found: list[str] = []
    for pattern in patterns:
        start, star, end = pattern.partition("*")
        found += [
            name
            for name in names
            if (name == pattern or (star and name.startswith(start) and name.endswith(end))) and name not in found
        ]
    return found
