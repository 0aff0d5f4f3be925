"""Curves of a finished run as PNG files: losses, the router, thinking ratios, throughput."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TrainingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (7.2, 4.2)
_EVAL = "eval_"
_NAMED_COLORS = {  # the same thing has the same color in every picture
    "loss": "#9a9a9a",
    "lm_loss": "#222222",
    "lm_loss_thinking": "#b3541e",
    "lm_loss_non_thinking": "#2a6f97",
    "router_loss": "#6a4c93",
    "router_accuracy": "#2a6f97",
    "router_auc": "#6a4c93",
    "router_ece": "#b3541e",
    "thinking_ratio": "#222222",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture: the curves whose names match `pattern`, training drawn as lines, evaluation as dots."""

    name: str
    pattern: str
    y_label: str
    is_share: bool = False
    """The curves lie in [0, 1]."""


FIGURES = (
    Figure("losses", r"(loss|lm_loss|lm_loss_thinking|lm_loss_non_thinking|router_loss)", "nats"),
    Figure("router", r"router_(accuracy|auc|ece)", "share", is_share=True),
    Figure("thinking_ratio", r"thinking_ratio(/.*)?", "share of queries sent to thinking", is_share=True),
    Figure("optimizer", r"grad_norm", "gradient norm before clipping"),
    Figure("learning_rate", r"learning_rate", "learning rate"),
    Figure("throughput", r"tokens_per_second", "tokens per second, all ranks"),
    Figure("queries", r"queries_per_second", "queries per second, all ranks"),
    Figure("memory", r"memory_gib", "GiB, peak of a process"),
)


def check_plotting() -> None:
    """Fail before a long run rather than after it.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            f'plots=True needs the package matplotlib ({error}): pip install "metis_home[train]", or set plots=False.'
        ) from error


def draw_curves(
    log_history: Sequence[Mapping[str, object]], out_dir: Path, figures: Iterable[Figure] = FIGURES
) -> list[Path]:
    """Draw every figure of which there is anything in the log.

    Args:
        log_history: `trainer.state.log_history`: one mapping per log, with `step`.
        out_dir: made if need be; files of the same names are replaced.
    Returns:
        The files, in the order of `figures`.
    Raises:
        TrainingError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    out_dir.mkdir(parents=True, exist_ok=True)
    drawn = []
    for figure in figures:
        curves = _curves(log_history, figure.pattern)
        if not curves:
            continue
        canvas = Canvas(figsize=_INCHES, layout="constrained")
        FigureCanvasAgg(canvas)
        _draw(canvas.add_subplot(), figure, curves)
        path = out_dir / f"{figure.name}.png"
        canvas.savefig(path, dpi=120)
        drawn.append(path)
    return drawn


def _curves(log_history: Sequence[Mapping[str, object]], pattern: str) -> dict[str, tuple[list[float], list[float]]]:
    """{name: (steps, values)} of the log's numbers whose name, without `eval_`, matches."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if isinstance(value, int | float) and re.fullmatch(pattern, name.removeprefix(_EVAL)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(entry["step"]))  # type: ignore[arg-type]
                values.append(float(value))
    return curves


def _draw(axes: "Axes", figure: Figure, curves: Mapping[str, tuple[list[float], list[float]]]) -> None:
    colors: dict[str, str] = {}
    for name in curves:
        plain = name.removeprefix(_EVAL)
        if plain not in colors:
            colors[plain] = _NAMED_COLORS.get(plain, f"C{len(colors)}")
    for name, (steps, values) in curves.items():
        plain = name.removeprefix(_EVAL)
        label = plain.replace("_", " ")
        if name.startswith(_EVAL):
            axes.plot(steps, values, "o--", color=colors[plain], ms=5, lw=1, label=f"{label} (evaluation)")
        else:
            axes.plot(steps, values, color=colors[plain], lw=1.5, marker="." if len(steps) < 3 else None, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(figure.y_label)
    if figure.is_share:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
