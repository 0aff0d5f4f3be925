"""Times of day and durations (`12:30`, `3:05 pm`, `1:02:03`), and ratios (`3:4`)."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from .normalise import clean
from .quantity import read_quantity
from .verdict import Unreadable

_TIME = re.compile(
    r"(?P<hours>\d{1,3})(?::(?P<minutes>[0-5]\d)(?::(?P<seconds>[0-5]\d(?:\.\d{1,6})?))?)?\s?(?P<half>[ap]\.? ?m\b\.?)?",
    re.IGNORECASE,
)
_OCLOCK = re.compile(r"\s?o'? ?clock\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Time:
    """Hours, minutes, seconds as written, with the half of the day where it is told."""

    hours: int
    minutes: int
    seconds: Fraction
    half: str  # "am", "pm" or ""

    @property
    def since_midnight(self) -> Fraction:
        """Seconds; without a half of the day the hours are read as on a 24-hour clock."""
        hours = self.hours % 12 + 12 * (self.half == "pm") if self.half else self.hours
        return Fraction(3600 * hours + 60 * self.minutes) + self.seconds


def read_time(text: str) -> Time:
    """`12:30`, `3 pm`, `3 o'clock`, `1:02:03.5`; a bare `3` is no time.

    Raises:
        Unreadable: it is none, or no such time exists.
    """
    text, oclock = _OCLOCK.subn("", clean(text))
    found = _TIME.fullmatch(text.strip())
    if found is None or not (found["minutes"] or found["half"] or oclock):
        raise Unreadable("is not a time")
    half = (found["half"] or "").lower().replace(".", "").replace(" ", "")
    hours = int(found["hours"])
    if half and not 1 <= hours <= 12:
        raise Unreadable(f"there is no {hours} {half}")
    return Time(hours, int(found["minutes"] or 0), Fraction(found["seconds"] or 0), half)


def same_time(gold: Time, prediction: Time) -> tuple[bool, str]:
    """Equal on the 24-hour clock; where the gold names no half of the day, equal on the dial is enough for one that does."""
    same = gold.since_midnight == prediction.since_midnight
    if not same and prediction.half and not gold.half and gold.hours <= 12:
        same = (gold.since_midnight - prediction.since_midnight) % 43200 == 0
    return same, "the times are equal" if same else "the times differ"


def read_ratio(text: str) -> tuple[Fraction, ...]:
    """`3:4`, `1 : 2 : 3`, `3 to 4`, scaled so that 2:4 is 1:2.

    Raises:
        Unreadable: fewer than two parts, a part that is no number, all parts zero.
    """
    parts = re.split(r"\s?(?::|\bto\b)\s?", clean(text).replace("\\colon", ":"))
    if not 2 <= len(parts) <= 6:
        raise Unreadable("is not a ratio")
    values = [read_quantity(part).value for part in parts]
    if any(value < 0 for value in values) or not any(values):
        raise Unreadable("is not a ratio of positive numbers")
    numerator, denominator = 0, 1
    for value in values:  # gcd of fractions: gcd of numerators over lcm of denominators
        numerator, denominator = (
            gcd(numerator * value.denominator, value.numerator * denominator),
            denominator * value.denominator,
        )
    unit = Fraction(numerator, denominator)
    return tuple(value / unit for value in values)
