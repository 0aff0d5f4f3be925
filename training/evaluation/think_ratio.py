"""How often a model thought, read off result files: lmms-eval samples, VLMEvalKit tables, our own completions.

| file | thought is known from |
|---|---|
| lmms-eval `..._samples_TASK.jsonl` | the raw answer (`resps`; `filtered_resps` where both are the same) |
| VLMEvalKit `MODEL_DATASET.xlsx` (.tsv, .csv, .json) | the `thinking` column (SPLIT_THINK=True), else the prediction |
| `completions.jsonl` of `metis-home evaluate` | the branch |
| any of them with a sidecar of our adapters | the branch; also P(thinking) and tokens |

Ours; the thinking ratio is Metis-HOME's measure.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metis_home.errors import DataError, MetisHomeError
from metis_home.responses import parse_response

from .kit import answer_digest
from .metrics import Proportion, mean, proportion

ALL = "all"
_TABLES = (".xlsx", ".tsv", ".csv")
_TEXTS = ("resps", "filtered_resps", "prediction")
_KEYS = ("task", "doc_id")


class TableError(MetisHomeError, ImportError):
    """A library that reads spreadsheets is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkRatio:
    """One benchmark, or one of its subjects."""

    benchmark: str
    subject: str
    """ALL for the whole benchmark."""
    thinking: Proportion
    mean_probability: float | None
    """Mean P(thinking), where a sidecar or our own file says it."""
    mean_tokens: float | None
    unmatched: int
    """Rows that a sidecar was given for, and that it does not hold; they were judged by their text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    subject: str | None
    thinks: bool
    probability: float | None
    tokens: float | None
    matched: bool


def think_ratios(
    file: Path, *, sidecar: Iterable[Path] = (), by: str | None = None, benchmark: str | None = None
) -> list[ThinkRatio]:
    """Read a result file: the whole benchmark first, then its subjects by name.

    Args:
        file: see the table above.
        sidecar: files that our adapters wrote (`router_log`), all processes' if there were several.
        by: the column with the subject, dotted into nested values ("mmmu_acc.subdomain"); default: `category` or
            `source` where there is such a column.
        benchmark: its name; default: from the file's name.
    Raises:
        DataError: the file cannot be read, holds no rows or no answers, or has no column `by`.
        TableError: no library here reads such a table.
    """
    rows = _read(file)
    if not rows:
        raise DataError(f"{file} holds no rows")
    logged = [row for path in sidecar for row in _read_lines(path)]
    names = _column(rows, by, file)
    name = benchmark or _benchmark(file, rows)
    by_answer = _by_answer(logged)
    judged = [_judge(row, file, number, by_answer, names) for number, row in enumerate(rows)]
    subjects = sorted({row.subject for row in judged if row.subject is not None})
    groups = [(ALL, judged), *((subject, [row for row in judged if row.subject == subject]) for subject in subjects)]
    return [
        ThinkRatio(
            benchmark=name,
            subject=subject,
            thinking=proportion(sum(row.thinks for row in members), len(members)),
            mean_probability=mean([row.probability for row in members if row.probability is not None]),
            mean_tokens=mean([row.tokens for row in members if row.tokens is not None]),
            unmatched=sum(not row.matched for row in members) if logged else 0,
        )
        for subject, members in groups
    ]


def _by_answer(rows: Sequence[Mapping[str, object]]) -> dict[object, Mapping[str, object]]:
    """A sidecar's rows by (task, doc_id) where they have it, and by the digest of the answer; the last one counts."""
    found: dict[object, Mapping[str, object]] = {}
    for row in rows:
        if "doc_id" in row:
            found[tuple(str(row.get(key)) for key in _KEYS)] = row
        else:
            found[row.get("digest")] = row
    return found


def _judge(
    row: Mapping[str, object],
    file: Path,
    number: int,
    logged: Mapping[object, Mapping[str, object]],
    names: Sequence[str],
) -> _Row:
    text, thought = _text(row), row.get("thinking")
    has_thought_column = "thinking" in row and "branch" not in row  # in our own files `thinking` is the mode
    whole = f"{_plain(thought)} {text or ''}" if has_thought_column else text
    told = logged.get((_benchmark(file, [row]), str(row.get("doc_id"))))
    if told is None and whole is not None:
        told = logged.get(answer_digest(whole))
    branch = (told or row).get("branch")
    if branch is not None:
        thinks = branch == "thinking"
    elif has_thought_column:
        thinks = bool(_plain(thought).strip())
    elif text is not None:
        thinks = bool(parse_response(text)["reasoning_content"])
    else:
        raise DataError(
            f"{file}, row {number}: no answer found. Expected a column resps, filtered_resps, prediction, thinking or "
            f"branch; found {', '.join(map(str, row))}"
        )
    source = told or row
    subject = _dig(row, names)
    return _Row(
        subject=None if subject is None or _plain(subject) == "" else _plain(subject),
        thinks=thinks,
        probability=_number(source.get("thinking_probability")),
        tokens=_tokens(source, row),
        matched=told is not None,
    )


def _text(row: Mapping[str, object]) -> str | None:
    for name in _TEXTS:
        value = row.get(name)
        while isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            return value
    return None


def _tokens(source: Mapping[str, object], row: Mapping[str, object]) -> float | None:
    if "completion_tokens" in row:
        return (_number(row["completion_tokens"]) or 0.0) + (_number(row.get("prefix_tokens")) or 0.0)
    counts = row.get("token_counts")
    if "tokens" not in source and isinstance(counts, list) and counts and isinstance(counts[0], dict):
        return _number(counts[0].get("output_tokens"))
    return _number(source.get("tokens"))


def _benchmark(file: Path, rows: Sequence[Mapping[str, object]]) -> str:
    if "branch" in rows[0] and isinstance(rows[0].get("source"), str):
        return file.parent.name or file.stem
    return file.stem.partition("_samples_")[2] or file.stem


def _column(rows: Sequence[Mapping[str, object]], by: str | None, file: Path) -> list[str]:
    if by is None:
        return next(([name] for name in ("category", "source") if any(name in row for row in rows)), [])
    names = by.split(".")
    if not any(_dig(row, names) is not None for row in rows):
        raise DataError(f"{file} has no column {by!r}; found {', '.join(map(str, rows[0]))}")
    return names


def _dig(row: object, names: Sequence[str]) -> object:
    if not names:
        return None
    for name in names:
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


def _read(file: Path) -> list[Mapping[str, object]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    if file.suffix == ".jsonl":
        return _read_lines(file)
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file}: expected a list of rows")
        return rows
    if file.suffix not in _TABLES:
        raise DataError(f"{file}: expected .jsonl, .json, {', '.join(_TABLES)}")
    try:
        import pandas as pd

        if file.suffix == ".xlsx":
            table = pd.read_excel(file, dtype=object)
        else:
            table = pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", dtype=object)
    except ImportError as error:
        raise TableError(
            f'{file}: reading it needs pandas and openpyxl: pip install "metis_home[train]" ({error})'
        ) from error
    except ValueError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _read_lines(file: Path) -> list[Mapping[str, object]]:
    rows: list[Mapping[str, object]] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{file}:{number}: expected an object, found a {type(row).__name__}")
                    rows.append(row)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: a line is not JSON: {error}") from error
    return rows


def _plain(value: object) -> str:
    """A cell as text; an empty cell of a table is NaN."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not math.isnan(value) else None
