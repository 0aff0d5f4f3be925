"""Numbers as people write them: integers, decimals, fractions, mixed numbers, percent, money, units, words."""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from .equations import leading_name
from .hedges import denies, doubts
from .normalise import clean, fold
from .spoken import NUMBER_WORDS, SCALES, spoken_number
from .units import BARE, CURRENCIES, Unit, conversion, read_unit
from .verdict import Unreadable

MAX_LENGTH = 160  # characters of a number with its unit
MAX_POWER_OF_TEN = 400
# Two readings of one number agree up to this, relative to the smaller side if that is below 1 (math-verify: 6 decimals).
CLOSENESS = Fraction(1, 10**6)

# `1.5M`, `$20K`; a K behind a bare number may be a kelvin.
_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9}
_THOUSAND_OR_KELVIN = Unit(Fraction(1000), (), (read_unit("K"),))
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s?(?:(?P<currency>[{CURRENCIES}])\s?(?P<sign2>[-+]?))?
    (?: (?:(?P<whole>\d{{1,30}})\s?)? \\frac\s?
        (?: \{{\s?(?P<ln>[-+]?\s?(?:{_DECIMAL}))\s?\}}\s?\{{\s?(?P<ld>[-+]?\s?(?:{_DECIMAL}))\s?\}}
          | (?P<sn>\d)\s?(?P<sd>\d) )
      | (?P<mixed>\d{{1,30}})(?:\s|\sand\s)(?P<mn>\d{{1,30}})\s?/\s?(?P<md>\d{{1,30}})
      | (?P<n>{_DECIMAL}) \s?/\s? (?P<d>{_DECIMAL})
      | 10\s?\^\s?(?:\{{\s?(?P<t>[-+]?\d{{1,6}})\s?\}}|(?P<t2>[-+]?\d{{1,6}}))
      | (?P<decimal>{_DECIMAL})
        (?: \s?[eE](?P<e>[-+]?\d{{1,6}})(?![a-zA-Z\d])
          | \s?(?:\\times|\\cdot|[×·*x])\s?10\s?\^\s?(?:\{{\s?(?P<p>[-+]?\d{{1,6}})\s?\}}|(?P<p2>[-+]?\d{{1,6}})) )?
    )""",
    re.VERBOSE,
)
_PERCENT = re.compile(r"%|per ?cent\b|percent(?:age)?(?: points?)?\b|pct\b", re.IGNORECASE)
_ABOUT = re.compile(
    r"^\s*(?:(?:(?:in\s+)?the\s+year|in(?=\s\d{4}\b)|about|approximately|approx\.?|around|roughly|\\approx|~)\s?)?",
    re.IGNORECASE,
)
_CODE = re.compile(r"^(?:(US\$|USD|EUR|GBP|INR|Rs\b\.?|RMB|CNY)\s?)(?=[\d.])", re.IGNORECASE)
_SIGN_OF = {"US$": "$", "USD": "$", "EUR": "€", "GBP": "£", "INR": "₹", "RS": "₹", "RMB": "¥", "CNY": "¥"}
_REPEATING = re.compile(r"(\d{0,12})\.(\d{0,12})\\overline\s?\{\s?(\d{1,12})\s?\}")
_SAID_TWICE = re.compile(r"(\S.{0,80})\s\(([^()]*[A-Za-z][^()]*)\)")
_COMPOUND = re.compile(r"\d+(?:\.\d+)?\s?(?![eE]\d)[A-Za-z]+(?:\s?(?:,|\band\b)?\s?\d+(?:\.\d+)?\s?[A-Za-z]+){1,3}")
_LABEL = re.compile(r"[A-Za-z][A-Za-z'-]{2,24}(?: [A-Za-z][A-Za-z'-]{1,24}){0,2}")
# What can be counted: "4 wait" and "4 false" count nothing.
_PLURAL = re.compile(
    r"(?!(?:this|yes|always|does|was|has|its)\b)[a-z][a-z'-]*[^s\W]s|people|men|women|children|fish|sheep|deer|feet|teeth|mice|geese|dice",
    re.IGNORECASE,
)
# Says how a number is meant, not of what it is: "12 cm long", "4 left".
_MANNER = re.compile(
    r"(?:^|\s)(?:in (?:total|all|length|width|height)|total"
    r"|altogether|left|remaining|each|long|wide|tall|high|deep|old|away|apart)$",
    re.IGNORECASE,
)
# Words after a number that change its meaning, or belong to another answer.
_NOT_LABELS = frozenset(
    "or and to not no more less than over under out of plus minus times squared cubed square root divided by about per "
    "but nor maybe if at least most greater fewer larger smaller sin cos tan log exp sqrt pi infinity mod vs versus is are "
    "wrong correct incorrect right factorial th half halves thirds quarter quarters tenth tenths hundredths".split()
) | NUMBER_WORDS  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact number with what stood around it."""

    value: Fraction  # 10% is 1/10; in the unit as written
    is_percent: bool = False
    unit: Unit = BARE
    label: str = ""  # what is counted, folded: "4 red apples" -> "red apple"
    name: str = ""  # the variable of `x = 3`
    counts: bool = True  # the label is a plural, or there is one of it: "4 apples", not "4 wait"

    @property
    def is_integer(self) -> bool:
        """A whole number without percent or unit conversion."""
        return self.value.denominator == 1


def read_quantity(text: str, *, in_percent: bool = False) -> Quantity:
    """Read the whole text as one number.

    Args:
        text: an answer, cleaned or not.
        in_percent: a bare number counts percents: `10` is 10 %.
    Raises:
        Unreadable: it is not one number: words, an expression, two numbers, nothing.
    """
    text = clean(text)
    if not text or len(text) > MAX_LENGTH:
        raise Unreadable("there is no number" if not text else f"longer than {MAX_LENGTH} characters")
    if re.fullmatch(r"\([^()]*\)", text):
        text = text[1:-1].strip()
    if (twice := _SAID_TWICE.fullmatch(text)) is not None:
        return _said_twice(twice[1], twice[2], in_percent=in_percent)
    name, text = leading_name(text)
    text = _ABOUT.sub("", text)
    text = _CODE.sub(lambda code: _SIGN_OF[code[1].upper().rstrip(".")], text)
    text = _REPEATING.sub(_as_fraction, text)
    if _COMPOUND.fullmatch(text) is not None:
        return _compound(text, name)
    found = _NUMBER.match(text)
    if found is None:
        return _from_words(text, name, in_percent=in_percent)
    value, rest = _value(found), _MANNER.sub("", text[found.end() :].strip())
    unit = read_unit(found["currency"]) if found["currency"] else BARE
    glued = text[found.end() : found.end() + 1] not in ("", " ")
    rest, scale = _take_scale(rest, with_suffix=glued or bool(found["currency"]))
    if scale == 1000 and unit.is_bare and not rest and glued and text[found.end()] == "K":
        unit = _THOUSAND_OR_KELVIN
    else:
        value *= scale
    is_percent = False
    if (percent := _PERCENT.match(rest)) is not None:
        is_percent, rest = True, rest[percent.end() :].strip()
    elif in_percent:
        is_percent = True
    if is_percent:
        value /= 100
    label, counts = "", True
    if rest:
        if found["currency"] is None:
            unit, label = _unit_or_label(rest, glued=glued and scale == 1)
            counts = _counts(value, label, rest)
        elif conversion(unit, read_unit(rest)) != 1:  # "$5 dollars" says it twice
            raise Unreadable(f"{rest!r} follows a sum of money")
    return Quantity(value, is_percent, unit, label, name, counts)


def same_quantity(gold: Quantity, prediction: Quantity, tolerance: Fraction | None = None) -> tuple[bool, str]:
    """Is the prediction the gold number? Returns the answer and, where it is no, the reason.

    A unit, label or variable name counts only where both sides have one. Units of one dimension are converted.
    Without a tolerance, whole numbers must be equal and others agree to six digits behind the point.

    Args:
        tolerance: largest absolute difference, in the gold's unit (percent of a percent gold: 0.01 is one percent point).
    """
    if gold.name and prediction.name and gold.name != prediction.name:
        return False, f"{prediction.name} is not {gold.name}"
    if prediction.label != gold.label and not prediction.counts:
        return False, f"{prediction.label!r} is nothing to count"
    if (gold.is_percent and not prediction.unit.is_bare) or (prediction.is_percent and not gold.unit.is_bare):
        return False, "measured in another unit"
    if gold.label and prediction.label and gold.label != prediction.label:
        return False, f"counts {prediction.label!r}, expected {gold.label!r}"
    value = prediction.value
    if not gold.unit.is_bare and not prediction.unit.is_bare:
        factor = conversion(gold.unit, prediction.unit)
        if factor is None:
            return False, "measured in another unit"
        value *= factor
    elif not gold.unit.dimensions and not prediction.unit.dimensions:
        value *= prediction.unit.factor / gold.unit.factor  # `20K`
    if (gold.label and not prediction.unit.is_bare) or (prediction.label and not gold.unit.is_bare):
        return False, "measured in another unit"
    if close(gold.value, value, tolerance):
        return True, "the numbers are equal"
    return False, "the numbers differ"


def close(gold: Fraction, value: Fraction, tolerance: Fraction | None = None) -> bool:
    """Symmetric closeness of two exact numbers; see `same_quantity`."""
    difference = abs(gold - value)
    if tolerance is not None:
        return difference <= tolerance
    # Below 1, so that two different whole numbers are never close.
    return difference <= CLOSENESS * min(Fraction(1), abs(gold), abs(value))


def _value(found: re.Match[str]) -> Fraction:
    negative = (found["sign"] == "-") != (found["sign2"] == "-")
    try:
        value = _unsigned(found)
    except (ZeroDivisionError, ValueError) as error:
        raise Unreadable(f"{found.group()!r} has no value: {error}") from None
    return -value if negative else value


def _unsigned(found: re.Match[str]) -> Fraction:
    if found["ln"]:
        return Fraction(found["whole"] or 0) + _decimal(found["ln"]) / _decimal(found["ld"])
    if found["sn"]:
        return Fraction(found["whole"] or 0) + Fraction(int(found["sn"]), int(found["sd"]))
    if found["mixed"]:
        return Fraction(found["mixed"]) + Fraction(int(found["mn"]), int(found["md"]))
    if found["n"]:
        return _decimal(found["n"]) / _decimal(found["d"])
    power = int(found["e"] or found["p"] or found["p2"] or found["t"] or found["t2"] or 0)
    if abs(power) > MAX_POWER_OF_TEN:
        raise ValueError(f"a power of ten above {MAX_POWER_OF_TEN}")
    return (_decimal(found["decimal"]) if found["decimal"] else 1) * Fraction(10) ** power


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "").replace(" ", "")
    return Fraction(text + "0" if text.endswith(".") else text)


def _take_scale(rest: str, *, with_suffix: bool) -> tuple[str, int]:
    word = re.match(r"[A-Za-z]+", rest)
    if word is None:
        return rest, 1
    scale = SCALES.get(word.group().lower()) or (_SUFFIXES.get(word.group()) if with_suffix else None)
    return (rest, 1) if scale is None else (rest[word.end() :].strip(), scale)


def _unit_or_label(rest: str, *, glued: bool) -> tuple[Unit, str]:
    rest = rest.removeprefix("\\ ").strip()
    try:
        return read_unit(rest), ""
    except Unreadable:
        words = rest.split()
        if (
            glued
            or _LABEL.fullmatch(rest) is None
            or denies(rest)
            or doubts(rest)
            or any(word.lower() in _NOT_LABELS for word in words)
        ):
            raise Unreadable(f"{rest[:40]!r} follows the number") from None
        *first, last = fold(rest).split()
        return BARE, " ".join([*first, last[:-1] if last.endswith("s") and not last.endswith("ss") else last])


def _from_words(text: str, name: str, *, in_percent: bool) -> Quantity:
    """`three`, `twenty-one`, `fifty percent`, `three apples`."""
    words = text.replace("-", " ").lower().split()
    value, said = spoken_number(words)
    if value is None or "-" in text[:1]:
        raise Unreadable("it is not a number")
    rest = " ".join(words[said:])
    if _PERCENT.fullmatch(rest) is not None or (in_percent and not rest):
        return Quantity(value / 100, is_percent=True, name=name)
    unit, label = _unit_or_label(rest, glued=False) if rest else (BARE, "")
    return Quantity(value, unit=unit, label=label, name=name, counts=_counts(value, label, rest))


def _counts(value: Fraction, label: str, words: str) -> bool:
    return not label or abs(value) <= 1 or any(_PLURAL.fullmatch(word) for word in words.split())


def _said_twice(text: str, again: str, *, in_percent: bool) -> Quantity:
    """`4 (four)`, `12 (people)`, `12 (cm)`: in brackets the same number, or what it counts."""
    first = read_quantity(text, in_percent=in_percent)
    try:
        second = read_quantity(again, in_percent=in_percent)
    except Unreadable:
        return read_quantity(f"{text} {again}", in_percent=in_percent)
    if not same_quantity(first, second)[0]:
        raise Unreadable("says two numbers")
    return first


def _compound(text: str, name: str) -> Quantity:
    """`1 hour 30 minutes`, `5 ft 6 in`: from large to small, in the first unit."""
    parts = [
        (Fraction(number), read_unit(unit)) for number, unit in re.findall(r"(\d+(?:\.\d+)?)\s?([A-Za-z]+)", text)
        if unit.lower() != "and"
    ]  # fmt: skip
    units = [unit for _, unit in parts]
    falling = all(one.factor > other.factor for one, other in pairwise(units))
    if not falling or len({unit.dimensions for unit in units}) > 1:
        raise Unreadable("is several quantities")
    return Quantity(
        sum((number * unit.factor for number, unit in parts), Fraction(0)) / units[0].factor, unit=units[0], name=name
    )


def _as_fraction(found: re.Match[str]) -> str:
    """`0.1\\overline{3}` -> `\\frac{12}{90}`."""
    whole, fixed, period = found.groups()
    shift, nines = 10 ** len(fixed), 10 ** len(period) - 1
    head = int((whole + fixed) or 0)
    return rf"\frac{{{head * nines + int(period)}}}{{{nines * shift}}}"
