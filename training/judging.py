"""Verify against a row: its golds, of which any is right, and its columns `kind`, `options` and `tolerance`.

Columns are read as data sets hold them: lists or numpy arrays, with None, NaN or "" where a row says nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, TypeGuard

from metis_home.errors import RewardError

from .verifier import Verdict, gold_problem, verify_answer

if TYPE_CHECKING:
    from .data.records import Record

Tolerance = float | int | str


@dataclass(frozen=True, slots=True)
class _Columns:
    kind: str | None
    options: tuple[str, ...] | None
    tolerance: Tolerance | None


def best_verdict(
    prediction: str, gold: object, kind: object = None, options: object = None, tolerance: object = None
) -> Verdict:
    """`verify_answer` with one gold or several: right by any of them, wrong only if one of them could be read.

    A gold that is missing, or neither a text nor a number, gives None.

    Raises:
        RewardError: a column of another type than it must have, or an unknown kind.
    """
    columns = _read_columns(kind, options, tolerance)
    verdicts = [_verdict(prediction, one, columns) for one in as_golds(gold)]
    return max(verdicts, key=lambda verdict: {True: 2, False: 1, None: 0}[verdict.correct])


def verify_record(prediction: str, record: "Record") -> Verdict:
    """`best_verdict` with everything the row says; a row without a gold cannot be judged."""
    if record.answer is None:
        return Verdict(correct=None, method="none", extracted=None, reason="the row has no answer")
    options, tolerance = record.columns.get("options"), record.columns.get("tolerance")
    return best_verdict(prediction, record.answer, record.kind, options, tolerance)


def record_problem(record: "Record") -> str | None:
    """Why answers to this row cannot be judged: a column or any of its golds cannot be read. None if they can."""
    if not record.answer:
        return "no answer"
    try:
        columns = _read_columns(record.kind, record.columns.get("options"), record.columns.get("tolerance"))
    except RewardError as error:
        return str(error)
    for number, gold in enumerate(record.golds, start=1):
        problem = gold_problem(gold, columns.kind, options=columns.options, tolerance=columns.tolerance)
        if problem is not None:
            return (
                problem if len(record.golds) == 1 else f"gold {number} of {len(record.golds)}, {gold!r:.80}: {problem}"
            )
    return None


def as_golds(gold: object) -> list[object]:
    """The golds of a row, at least one: the entries of a list, or the only one."""
    gold = plain(gold)
    return (list(gold) if is_list(gold) else [gold]) or [None]


def gold_text(gold: object) -> str | None:
    """One gold as a text; None if it is missing, or neither a text nor a number."""
    gold = plain(gold)
    if isinstance(gold, str):
        return gold
    if isinstance(gold, float | Decimal) and not math.isfinite(gold):
        return None
    return str(gold) if isinstance(gold, int | float | Decimal) else None


def read_options(options: object) -> tuple[str, ...] | None:
    """The texts of a column `options`, in order; None where the row has none.

    Raises:
        RewardError: it is no list, such as a dictionary or one long text, or holds something else than texts and numbers.
    """
    options = plain(options)
    if is_missing(options) or options == []:
        return None
    if not is_list(options):
        raise RewardError(
            f"options are {options!r:.80}, a {type(options).__name__}; expected the list of their texts in order."
        )
    texts = tuple(gold_text(option) for option in options)
    for option, text in zip(options, texts, strict=True):
        if text is None:
            raise RewardError(
                f"options hold {option!r:.80}; expected texts or numbers. Leave out options that are none."
            )
    return texts  # type: ignore[return-value]  # none of them is None


def plain(value: object) -> object:
    """numpy's arrays and scalars (and torch's, pandas') as Python's; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """A sequence of entries; a text is one entry."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def is_missing(value: object) -> bool:
    """None, NaN or a blank text: how JSON, pandas and CSV write that a row says nothing."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _verdict(prediction: str, gold: object, columns: _Columns) -> Verdict:
    text = gold_text(gold)
    if text is None:
        reason = f"gold: expected a text or a number, found {gold!r:.80}"
        return Verdict(None, columns.kind or "none", None, reason, "unparsed_gold")
    return verify_answer(prediction, text, columns.kind, options=columns.options, tolerance=columns.tolerance)


def _read_columns(kind: object, options: object, tolerance: object) -> _Columns:
    kind, tolerance = (None if is_missing(value) else value for value in map(plain, (kind, tolerance)))
    if not isinstance(kind, str | None):
        raise RewardError(f"kind is {kind!r:.80}; expected the name of a kind of answer, see docs/rewards.md.")
    if not isinstance(tolerance, float | int | str | Decimal | None) or isinstance(tolerance, bool):
        raise RewardError(f'tolerance is {tolerance!r:.80}; expected a number such as 0.01, or a share such as "5%".')
    tolerance = str(tolerance) if isinstance(tolerance, Decimal) else tolerance
    return _Columns(kind, read_options(options), tolerance)
