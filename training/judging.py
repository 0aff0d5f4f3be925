"""Verify against a row: its gold, its kind, and what its columns `options` and `tolerance` say."""

from typing import TYPE_CHECKING

from .verifier import Verdict, gold_problem, verify_answer

if TYPE_CHECKING:
    from .data.records import Record


def verify_record(prediction: str, record: "Record") -> Verdict:
    """`verify_answer` with everything the row says; a row without a gold cannot be judged."""
    if record.answer is None:
        return Verdict(correct=None, method="none", extracted=None, reason="the row has no answer")
    options, tolerance = _columns(record)
    return verify_answer(prediction, record.answer, record.kind, options=options, tolerance=tolerance)


def record_problem(record: "Record") -> str | None:
    """Why no answer to this row can be judged; None if one can."""
    if not record.answer:
        return "no answer"
    options, tolerance = _columns(record)
    return gold_problem(record.answer, record.kind, options=options, tolerance=tolerance)


def _columns(record: "Record") -> tuple[list[str] | None, float | int | str | None]:
    options, tolerance = record.columns.get("options"), record.columns.get("tolerance")
    return (
        [str(option) for option in options] if isinstance(options, list | tuple) else None,
        tolerance if isinstance(tolerance, int | float | str) else None,
    )
