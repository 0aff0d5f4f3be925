"""Ranges and what else joins numbers by hyphens: `30-39`, `$5-$10`, `9:30-10:30`, seasons, scores, telephone numbers.

None of them is a subtraction. Parts are compared one by one.
"""

import re
from dataclasses import replace
from fractions import Fraction

from .clock import Time, read_time, same_time
from .normalise import clean
from .quantity import Quantity, read_quantity, same_quantity
from .units import CURRENCIES
from .verdict import Unreadable

MAX_LENGTH = 80  # characters
_BEGINNING = re.compile(r"^(?:from|between)\s+", re.IGNORECASE)
_SIGNED = rf"[-+]?\s?[{CURRENCIES}]?\s?\d"
# A hyphen after a digit, unit or percent sign and before a number: `-5--3` is from -5 to -3.
_JOINT = re.compile(rf"(?<=[\w%.°])\s?(?:--?|\bto\b|\bthrough\b|\band\b)\s?(?={_SIGNED})", re.IGNORECASE)
_DIGITS = re.compile(r"\d+")

Part = Quantity | Time | str  # str: digits that begin with 0, where 05 is not 5


def is_range(text: str) -> bool:
    """Is it numbers or times joined by hyphens or "to"?"""
    try:
        read_range(text)
    except Unreadable:
        return False
    return True


def read_range(text: str) -> tuple[Part, ...]:
    """`30-39`, `30 to 39`, `from $5 to $10`, `5-10 cm`, `123-45-6789`; a unit at the end belongs to all parts.

    Raises:
        Unreadable: fewer than two parts, or a part is neither a number nor a time.
    """
    text = clean(text)
    if len(text) > MAX_LENGTH:
        raise Unreadable(f"longer than {MAX_LENGTH} characters")
    begun = _BEGINNING.match(text) is not None
    pieces = _JOINT.split(_BEGINNING.sub("", text))
    if not 2 <= len(pieces) <= 5 or (not begun and re.search(r"\band\b", text)):
        raise Unreadable("is not a range")
    parts = [_read_part(piece.strip()) for piece in pieces]
    last = parts[-1]
    if isinstance(last, Quantity):
        parts = [_with_unit_of(last, part) for part in parts]
    return tuple(parts)


def same_range(gold: tuple[Part, ...], prediction: tuple[Part, ...], tolerance: Fraction | None) -> tuple[bool, str]:
    """The same parts in the same order."""
    same = len(gold) == len(prediction) and all(
        _same_part(wanted, found, tolerance) for wanted, found in zip(gold, prediction, strict=True)
    )
    return same, "the ranges are equal" if same else "the ranges differ"


def _read_part(text: str) -> Part:
    if _DIGITS.fullmatch(text) and text.startswith("0") and len(text) > 1:
        return text
    try:
        quantity = read_quantity(text)
    except Unreadable:
        return read_time(text)
    if quantity.name:
        raise Unreadable("names a variable")
    return quantity


def _with_unit_of(last: Quantity, part: Part) -> Part:
    if not isinstance(part, Quantity) or not part.unit.is_bare or part.label or part.is_percent:
        return part
    value = part.value / 100 if last.is_percent else part.value
    return replace(part, value=value, is_percent=last.is_percent, unit=last.unit, label=last.label)


def _same_part(gold: Part, prediction: Part, tolerance: Fraction | None) -> bool:
    if isinstance(gold, Quantity) and isinstance(prediction, Quantity):
        return same_quantity(gold, prediction, tolerance)[0]
    if isinstance(gold, Time) and isinstance(prediction, Time):
        return same_time(gold, prediction)[0]
    return gold == prediction
