"""`export_recipe`: the files that another trainer needs, in a folder that can be moved to another machine."""

import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.errors import OutputError, RecipeError

from ...recipe import Recipe
from ..pass_rates import check_prompts
from ..portable import portable_row
from . import swift, trl, verl
from .settings import RLSettings, settings_of

if TYPE_CHECKING:
    from ...data.records import Record

TARGETS: dict[str, Callable[[RLSettings, Sequence[dict[str, object]], Path], list[str]]] = {
    "trl": trl.write,
    "verl": verl.write,
    "swift": swift.write,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What was written."""

    folder: Path
    rows: int
    not_carried_over: list[str]
    """What the other trainer has no word for, or calls otherwise: to be read by a person."""


def export_recipe(recipe: Recipe, records: "Sequence[Record]", out: Path, *, target: str) -> Handover:
    """Write a Stage-RL recipe in the form of `target`.

    Args:
        recipe: with stage rl, for a dense model.
        records: its prompts, with golds that can be judged; images are copied into the folder.
        target: trl, verl or swift.
    Raises:
        RecipeError: unknown target, or a recipe that only our trainer can carry out.
        DataError: rows that cannot be sampled or judged, listed. OutputError: `out` exists.
    """
    if target not in TARGETS:
        raise RecipeError(f"unknown target {target!r}. Expected one of {', '.join(TARGETS)}.")
    settings = settings_of(recipe)
    check_prompts(records)
    if out.exists():
        raise OutputError(f"{out} already exists. Use another folder.")
    unfinished = out.with_name(f".{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        rows = _with_golds_of_one_type([_row(record, unfinished) for record in records])
        notes = TARGETS[target](settings, rows, unfinished)
        for script in unfinished.glob("*.sh"):
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Handover(folder=out, rows=len(rows), not_carried_over=notes)


def _row(record: "Record", folder: Path) -> dict[str, object]:
    """What every target needs of a record; the columns that the verifier reads come along."""
    columns = {name: record.columns[name] for name in ("options", "tolerance") if record.columns.get(name) is not None}
    return {**portable_row(_with_copied_images(record), folder / "prompts.jsonl"), **columns}


def _with_golds_of_one_type(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Where a row has several golds all have a list: Parquet and `datasets` read columns of one type."""
    if not any(isinstance(row["solution"], list) for row in rows):
        return rows
    return [{**row, "solution": gold if isinstance(gold := row["solution"], list) else [gold]} for row in rows]


def _with_copied_images(record: "Record") -> "Record":
    """The record with every image as bytes, so that `portable_row` writes them into the folder."""
    from dataclasses import replace

    from ...evaluation.fingerprint import image_bytes

    def copied(value: object) -> object:
        if isinstance(value, dict):
            if value.get("type") == "image" and isinstance(value.get("image"), str):
                source = value["image"]
                return value if source.startswith("data:") else {**value, "image": image_bytes(source)}
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    return replace(record, messages=copied(record.messages))  # type: ignore[arg-type]
