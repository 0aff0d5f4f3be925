"""What is wrong with a row, and how a list of that is told."""

from collections.abc import Sequence
from dataclasses import dataclass

from metis_home.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason why one row cannot be used."""

    row: int
    """Number of the row in its file, from 0 (of a JSONL file: the line)."""
    id: str
    reason: str
    """A short phrase, the same for all rows with this problem: reports count by it."""
    detail: str
    """What was found in this row, and what was expected."""

    def __str__(self) -> str:
        return f"row {self.row} ({self.id}): {self.reason}: {self.detail}"


class RowError(DataError):
    """One row cannot be used; caught by whoever goes through all rows."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def at(self, row: int, id: str) -> Problem:
        """The problem as it is reported."""
        return Problem(row=row, id=id, reason=self.reason, detail=self.detail)


def raise_problems(problems: Sequence[Problem], rows: int) -> None:
    """Raise unless `problems` is empty.

    Args:
        rows: how many rows were looked at.
    Raises:
        DataError: lists every problem, one per line.
    """
    if problems:
        bad = len({problem.row for problem in problems})
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise DataError(f"{bad} of {rows} rows cannot be used:\n{listed}\nMend or remove these rows.")
