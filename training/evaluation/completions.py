"""The file that an evaluation grows, one line per answer, and what may be added to it.

A run directory holds `run.json` (which model, with which settings) and `completions.jsonl`. Every line is written and
flushed before the next batch is generated, so a run that was killed goes on where it stopped. Standard library only.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from metis_home.errors import DataError, OutputError

Mode = Literal["auto", "on", "off"]
MODES: tuple[Mode, ...] = ("auto", "on", "off")
RUN_FILE = "run.json"
COMPLETIONS_FILE = "completions.jsonl"
# Files made from the completions; with these two, all that a run directory holds.
DERIVED_FILES = ("report.json", "view.html", "modes.png", "router.png", "tradeoff.png", "calibration.json")
_OF_AUTO_ONLY = "threshold"  # the setting that answers with a forced branch do not depend on


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer to one row, with everything the report needs."""

    id: str
    index: int
    source: str
    row: str
    """Fingerprint of the row: question, images, gold answer."""
    thinking: Mode
    prompt: str
    """The text of the last user turn."""
    images: list[str]
    """Where the images are: paths as given, or files that the run saved (relative to the run directory)."""
    gold: str | None
    kind: str | None
    label: str | None
    """The row's own `mode`, "thinking" or "non-thinking"; None where it has none."""
    branch: str | None
    """The branch that answered; None for a dense model."""
    thinking_probability: float | None
    """P(thinking) of the router; None for a dense model."""
    prefix: str
    """What the prompt already held of the answer: nothing, `<think>` or `<think></think>`."""
    completion: str
    """What the model wrote after the prefix, tags included, special tokens removed."""
    reasoning: str
    content: str
    extracted: str | None
    correct: bool | None
    method: str
    reason: str
    prompt_tokens: int
    prefix_tokens: int
    completion_tokens: int
    """Tokens the model wrote, its end token included."""
    finished: bool
    """The model ended the answer itself; False where max_new_tokens cut it."""
    seconds: float
    """This answer's share of its batch's wall time."""
    router_seconds: float
    """Its share of asking the router; 0 where it was not asked for this answer."""

    @property
    def tokens(self) -> int:
        """Length of the answer: the prefix counts, whoever wrote it, so that all modes are counted alike."""
        return self.prefix_tokens + self.completion_tokens


def split_modes(given: Sequence[str]) -> list[str]:
    """The names of modes in texts that hold one, or several with commas.

    Raises:
        DataError: a name that is none of auto, on and off, or no name at all.
    """
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names or any(name not in MODES for name in names):
        raise DataError(f"expected auto, on, off, or several with commas; found {', '.join(given)!r}.")
    return names


class CompletionFile:
    """`completions.jsonl` of one run directory.

    Attributes:
        rows: the answers so far, by (mode, id), in the order in which they were written.
        old_threshold: rows of mode "auto" were answered with another threshold than this run's; only where this run
            does not ask for that mode.
    """

    old_threshold = False

    def __init__(self, directory: Path) -> None:
        """Open the file; a last line that a kill left unfinished is cut off.

        Raises:
            OutputError: a line other than the last is not a completion.
        """
        self.path = directory / COMPLETIONS_FILE
        self.rows: dict[tuple[str, str], Completion] = {}
        if self.path.exists():
            self._load()

    def append(self, completions: Iterable[Completion]) -> None:
        """Write completions to the end of the file and to the disk."""
        added = list(completions)
        with self.path.open("a", encoding="utf-8") as file:
            for row in added:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {(row.thinking, row.id): row for row in added}

    def _load(self) -> None:
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
            try:
                row = Completion(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise OutputError(
                    f"{self.path}:{number}: not a completion of this version ({error}). "
                    "Remove the directory, or start again with --overwrite."
                ) from error
            self.rows[row.thinking, row.id] = row
        if complete < len(data):
            with self.path.open("r+b") as file:
                file.truncate(complete)


def open_run(
    directory: Path,
    model: Mapping[str, object],
    settings: Mapping[str, object],
    modes: Sequence[Mode],
    *,
    overwrite: bool,
) -> CompletionFile:
    """Begin a run, or go on with the one in `directory`.

    Args:
        directory: made if it is not there.
        model: what identifies the model, for run.json; must be the same to go on.
        settings: what the answers depend on; must be the same to go on. The threshold only matters to mode "auto".
        modes: what this run asks for.
        overwrite: forget what is there. Only files that a run writes are removed.
    Raises:
        OutputError: the directory holds another run, or files that no run of this version wrote.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run_path = directory / RUN_FILE
    ours = [run_path, directory / COMPLETIONS_FILE, *(directory / name for name in DERIVED_FILES)]
    if overwrite:
        for path in ours:
            path.unlink(missing_ok=True)
    now = json.loads(json.dumps({"model": model, "settings": settings}))  # tuples become lists, as in the file
    if not run_path.exists():
        found = [path.name for path in ours if path.exists()]
        if found:
            raise OutputError(
                f"{directory} holds {', '.join(found)} but no {RUN_FILE}. Choose another, or --overwrite."
            )
        write_json(run_path, now)
        return CompletionFile(directory)
    completions = CompletionFile(directory)
    try:
        before = json.loads(run_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{run_path} is not JSON ({error}). Choose another directory, or --overwrite.") from error
    differences = _differences(before, now)
    has_auto = any(mode == "auto" for mode, _ in completions.rows)
    if not has_auto or "auto" not in modes:
        other_threshold = differences.pop(f"settings.{_OF_AUTO_ONLY}", None)
        if has_auto and other_threshold:
            completions.old_threshold = True
            now["settings"][_OF_AUTO_ONLY] = other_threshold[0]  # run.json speaks of the rows that are there
    if differences and completions.rows:
        listed = "; ".join(f"{name}: {old} there, {new} now" for name, (old, new) in differences.items())
        raise OutputError(
            f"{directory} holds answers of another run ({listed}). Choose another directory, or --overwrite."
        )
    write_json(run_path, now)
    return completions


def check_rows(completions: CompletionFile, fingerprints: Mapping[str, str]) -> None:
    """Raise where stored answers are to rows that are gone or have changed.

    Args:
        fingerprints: of every row of the data, by id; not only of those that are to be answered now.
    Raises:
        OutputError: names some of these rows.
    """
    changed = sorted({row.id for row in completions.rows.values() if fingerprints.get(row.id, row.row) != row.row})
    gone = sorted({row.id for row in completions.rows.values() if row.id not in fingerprints})
    if changed or gone:
        told = [
            f"{len(ids)} rows {what} ({', '.join(ids[:5])})"
            for ids, what in ((changed, "changed"), (gone, "gone"))
            if ids
        ]
        raise OutputError(
            f"{completions.path.parent} holds answers to other data: {'; '.join(told)}. "
            "Choose another directory, or --overwrite."
        )


def write_json(path: Path, content: object) -> None:
    """Write JSON that appears complete or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _differences(before: object, now: object, name: str = "") -> dict[str, tuple[object, object]]:
    """Leaves that differ, by their dotted names."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[object, object]] = {}
        for key in sorted(before.keys() | now.keys()):
            found |= _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if before == now else {name: (before, now)}
