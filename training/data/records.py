"""`Record`: one row of a data set, as everything in training and evaluation reads it."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.branch import Branch
from metis_home.errors import DataError
from metis_home.media import Message

from ..judging import as_golds, gold_text, plain
from .conversation import conversation
from .formats import MODES, build_response
from .problems import Problem, RowError, raise_problems
from .rows import Row, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

_KNOWN = {
    *("prompt", "messages", "image", "images"),
    *("response", "reasoning", "answer", "solution", "mode", "source", "kind", "id"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row. Images are not opened yet: their blocks hold a path, bytes or a PIL image."""

    index: int
    """Number of the row in its file, from 0 (of a JSONL file: the line)."""
    id: str
    """The row's `id`, else "<file stem>:<index>"."""
    messages: list[Message]
    """The conversation up to the turn that is to be answered; images as `{"type": "image", "image": source}`."""
    response: str | None
    """The full answer of the assistant with its tags, which Stage-SFT trains; None where the row has none."""
    answer: str | list[str] | None
    """What is right: the row's `solution`, else its `answer`; a list of several where any of them is right."""
    mode: Branch | None
    """The branch that should answer; None where the row does not say."""
    source: str
    """Which collection the row is from: its `source`, else the file's stem."""
    kind: str | None
    """How the answer is verified, see `verify_answer`; None: found out from the answer."""
    columns: dict[str, object] = field(default_factory=dict)
    """Every other column, untouched; reward functions get them."""

    @property
    def golds(self) -> list[str]:
        """Every right answer; none where the row has no gold."""
        return self.answer if isinstance(self.answer, list) else [] if self.answer is None else [self.answer]

    @property
    def gold_text(self) -> str | None:
        """The golds in one line, for people."""
        return " or ".join(self.golds) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What was found in a source."""

    records: list[Record]
    problems: list[Problem]
    """The rows that are no record, with the reason."""


def load_records(
    source: "str | os.PathLike[str] | Sequence[Row] | Dataset", *, image_root: str | os.PathLike[str] | None = None
) -> list[Record]:
    """Read every row of a data set.

    A row has `prompt` (a text) or `messages` (which may end with the assistant's message: the response); `image` or
    `images`; `response`, or `reasoning` and `answer`; and, all optional, `solution`, `mode` (thinking or non_thinking),
    `source`, `kind`, `id`. `solution` and `answer` may be lists of golds of which any is right; a response is made of
    the first one. See `conversation` for where the images go.

    Args:
        source: a .jsonl, .json or .parquet file, a saved `datasets` directory, "name[:split]" on the hub, a
            `datasets.Dataset`, or a list of rows.
        image_root: where relative image paths begin; default: the folder of the file, else the working directory.
    Raises:
        DataError: the source cannot be read, or rows of it are no records; lists every such row.
    """
    scan = scan_records(source, image_root=image_root)
    raise_problems(scan.problems, len(scan.records) + len(scan.problems))
    return scan.records


def scan_records(
    source: "str | os.PathLike[str] | Sequence[Row] | Dataset", *, image_root: str | os.PathLike[str] | None = None
) -> Scan:
    """As `load_records`, with bad rows returned beside the good ones instead of raised.

    Raises:
        DataError: the source itself cannot be read.
    """
    found = read_rows(source)
    folder = found.folder if image_root is None else Path(image_root)
    records, problems = [], []
    for index, row in found.rows:
        name = f"{found.name}:{index}"
        if not isinstance(row, RowError):
            name = str(row.get("id") or name) if row.get("id") != 0 else "0"
            try:
                records.append(_record(row, index, name, found.name, folder))
                continue
            except RowError as error:
                row = error
        problems.append(row.at(index, name))
    return Scan(records=records, problems=problems)


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSONL; the file appears complete, by rename.

    Raises:
        DataError: a row holds what JSON cannot (such as bytes). OSError: the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                try:
                    line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise DataError(f"row {number} cannot be written as JSON: {error}") from error
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _record(row: Row, index: int, name: str, stem: str, folder: Path | None) -> Record:
    """Build the record of one row.

    Raises:
        RowError: the row is none.
    """
    mode = _mode(row)
    reasoning, answers, solutions = _text(row, "reasoning"), _golds(row, "answer"), _golds(row, "solution")
    messages, from_messages = conversation(row, folder)
    response = _text(row, "response")
    if response is not None and from_messages is not None:
        raise RowError("two responses", "a response column and an assistant's last message; expected one of the two")
    response = from_messages if response is None else response
    if response is None and answers:
        # Without reasoning, an answer is only the gold of a row that is to be answered, unless the row says otherwise.
        if mode is Branch.NON_THINKING:
            response = build_response("", answers[0], mode)
        elif reasoning is not None:
            response = build_response(reasoning, answers[0], Branch.THINKING)
    golds = solutions or answers
    return Record(
        index=index,
        id=name,
        messages=messages,
        response=response,
        answer=golds if len(golds) > 1 else golds[0] if golds else None,
        mode=mode,
        source=_text(row, "source") or stem,
        kind=_text(row, "kind"),
        columns={key: value for key, value in row.items() if key not in _KNOWN},
    )


def _mode(row: Row) -> Branch | None:
    mode = row.get("mode")
    if mode is None or isinstance(mode, Branch):
        return mode
    if not isinstance(mode, str) or mode not in MODES:
        raise RowError("unknown mode", f"expected {' or '.join(MODES)}, found {mode!r}")
    return MODES[mode]


def _text(row: Row, key: str) -> str | None:
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    raise RowError("wrong type", f"{key} must be a text, found a {type(value).__name__}")


def _golds(row: Row, key: str) -> list[str]:
    """The different texts of a column that holds one gold, a list of them, or nothing."""
    value = plain(row.get(key))
    if value is None or value == [] or (isinstance(value, float) and math.isnan(value)):  # pandas: NaN is none
        return []
    golds = []
    for one in as_golds(value):
        text = None if isinstance(one, bool) else gold_text(one)
        if text is None:
            raise RowError(
                "wrong type", f"{key} must be a text, a number, or a list of them; found a {type(one).__name__}"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RowError("not Unicode", f"{key} {text!r:.80} holds half a character, which no model can write")
        golds.append(text)
    return list(dict.fromkeys(golds))
