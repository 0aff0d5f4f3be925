"""`calibrate`: pick `router_threshold` on held-out data, and write it into a model's generation config."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.config_fields import MODEL_TYPE
from metis_home.errors import CheckpointError, OutputError
from metis_home.training.data.records import Record

from .completions import Completion, write_json
from .metrics import Proportion, proportion
from .plots import queries_of, save_tradeoff
from .report import EvaluationReport
from .run import Progress, evaluate
from .tradeoff import Outcome, Query, Target, at_threshold, pick, trade_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.processing import MetisHomeProcessor

GENERATION_CONFIG = "generation_config.json"
_DERIVED = "_from_model_config"  # transformers drops fields that it does not know from a file with this mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A picked threshold, and everything it was picked from."""

    target: Target
    picked: Outcome
    accuracy: Proportion
    """Of the picked outcome, with its 95 % interval: the data are a sample."""
    current: Outcome
    """What the threshold in use before does on the same data."""
    curve: list[Outcome]
    queries: int
    unscored: int
    """Queries without a verdict on both answers; they count for tokens and ratio, not for accuracy."""
    tied: int
    """Queries that share their probability with another: no threshold tells these apart."""
    auto_differs: int | None
    """Rows of mode "auto" in the same run whose answer is not that of their branch's forced mode; None without such rows.
    Where it is 0, the curve is exactly what the router will do."""
    report: EvaluationReport

    def to_dict(self) -> dict[str, object]:
        """What `calibration.json` holds."""
        names = ("target", "picked", "accuracy", "current", "queries", "unscored", "tied", "auto_differs", "curve")
        found = {name: getattr(self, name) for name in names}
        plain = {
            name: [asdict(item) for item in value]
            if isinstance(value, list)
            else (asdict(value) if hasattr(value, "__dataclass_fields__") else value)
            for name, value in found.items()
        }
        report = self.report
        return {
            **plain,
            "model": report.model,
            "data": report.data,
            "settings": report.settings,
            "environment": report.environment,
        }


def calibrate(
    model: "PreTrainedModel",
    processor: "MetisHomeProcessor",
    records: Sequence[Record],
    target: Target,
    *,
    out_dir: str | os.PathLike[str],
    plots: bool = True,
    progress: Progress | None = None,
    **options: object,
) -> Calibration:
    """Answer every query with both branches once, and pick the threshold that fits the target best.

    Every threshold's outcome then follows by arithmetic (`tradeoff.py`). Answers are kept in `out_dir` as `evaluate`
    keeps them, and answers of an evaluation there (modes on and off) are used. Writes `calibration.json` and
    `tradeoff.png`; the model itself is not changed, see `write_threshold`.

    The forced branches begin with their prefix in the prompt, while a routed query writes it itself: the same answer for
    a model that keeps its format. `auto_differs` counts where it is not, if `out_dir` has answers in mode "auto".

    Args:
        target: what the threshold should reach.
        **options: as for `evaluate`: system_prompt, max_new_tokens, batch_tokens, limit, overwrite, ...
    Raises:
        DataError: the target cannot be reached (the message names the range). CheckpointError: a dense model.
        As `evaluate` otherwise.
    """
    if model.config.model_type != MODEL_TYPE:
        raise CheckpointError(
            f"a {model.config.model_type} model has no router to calibrate. Expected a two-branch model, which "
            "`metis-home convert` makes."
        )
    report = evaluate(
        model,
        processor,
        records,
        thinking=("on", "off"),
        out_dir=out_dir,
        plots=False,
        progress=progress,
        **options,  # type: ignore[arg-type]
    )
    queries = queries_of(report.completions)
    curve = trade_off(queries)
    picked = pick(curve, target)
    scored = sum(None not in query.correct for query in queries)
    found = Calibration(
        target=target,
        picked=picked,
        accuracy=proportion(round((picked.accuracy or 0.0) * scored), scored),
        current=at_threshold(queries, float(report.settings["threshold"])),  # type: ignore[arg-type]
        curve=curve,
        queries=len(queries),
        unscored=len(queries) - scored,
        tied=_tied(queries),
        auto_differs=_auto_differs(report.completions),
        report=report,
    )
    write_json(Path(out_dir) / "calibration.json", found.to_dict())
    if plots:
        save_tradeoff(curve, picked, Path(out_dir) / "tradeoff.png")
    return found


def check_writable(directory: Path) -> None:
    """Raise unless a threshold could be written there; asked before hours of generation, not after.

    Raises:
        OutputError: no local model directory (a hub id, say), or it cannot be written.
        CheckpointError: its generation config is not JSON.
    """
    if not (directory / "config.json").is_file():
        raise OutputError(
            f"{directory} is not a local model directory, so no threshold can be written there. Download the model "
            "first, or use --dry-run."
        )
    if not os.access(directory, os.W_OK):
        raise OutputError(f"{directory} cannot be written. Copy the model, or use --dry-run.")
    _read(directory / GENERATION_CONFIG)


def write_threshold(directory: Path, threshold: float) -> list[str]:
    """Write `router_threshold` into a model's generation_config.json, by rename; every other field stays.

    One mark goes where it is set: a config that says it was derived from the model's (`_from_model_config`) loses
    `router_threshold` when it is loaded.

    Returns:
        The names of the fields that changed.
    Raises:
        OutputError, CheckpointError: as `check_writable`.
    """
    check_writable(directory)
    path = directory / GENERATION_CONFIG
    before = _read(path)
    after = {name: value for name, value in before.items() if not (name == _DERIVED and value)}
    after["router_threshold"] = threshold
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if path.exists():
            shutil.copymode(path, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _read(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected an object with generation settings")
    return found


def _tied(queries: Sequence[Query]) -> int:
    counts: dict[float, int] = {}
    for query in queries:
        counts[query.thinking_probability] = counts.get(query.thinking_probability, 0) + 1
    return sum(count for count in counts.values() if count > 1)


def _auto_differs(completions: Sequence[Completion]) -> int | None:
    by_mode: dict[str, dict[str, Completion]] = {"auto": {}, "on": {}, "off": {}}
    for row in completions:
        by_mode[row.thinking][row.id] = row
    if not by_mode["auto"]:
        return None
    differing = 0
    for id, row in by_mode["auto"].items():
        forced = by_mode["on" if row.branch == "thinking" else "off"].get(id)
        differing += forced is not None and row.completion != forced.prefix + forced.completion
    return differing
