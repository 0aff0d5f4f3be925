"""For each kind: read the gold, and return how a prediction is compared with it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from . import choice, clock, quantity, ranges, sequences, words
from .equations import leading_name
from .expression import GoldUnreadable, looks_mathematical, require_readable, same_expression
from .hedges import denies, doubts
from .kinds import infer_kind
from .measured import same_measured, split_unit
from .normalise import clean, fold
from .verdict import TimedOut, Unreadable

Compare = Callable[[str], tuple[bool, str]]  # raises Unreadable for the prediction, GoldUnreadable for the gold


@dataclass(frozen=True, slots=True)
class Settings:
    """What a question says beside its gold."""

    options: tuple[str, ...] | None
    tolerance: Fraction | None


def _choice(gold: str, settings: Settings) -> Compare:
    right = choice.read_gold_choice(gold, settings.options)
    return lambda text: choice.same_choice(right, text, _same_option)


def _choices(gold: str, settings: Settings) -> Compare:
    right = choice.read_letters(gold)
    gold_word = clean(gold).upper()

    def compare(text: str) -> tuple[bool, str]:
        found = choice.read_letters(text)
        word = clean(text).upper()
        if word.isalpha() and gold_word.isalpha():  # may be an angle: ABC is not BAC
            return word == gold_word, f"chooses {word}"
        return found == right, f"chooses {', '.join(sorted(found))}"

    return compare


def _boolean(gold: str, settings: Settings) -> Compare:
    right = words.read_boolean(gold)

    def compare(text: str) -> tuple[bool, str]:
        found = words.read_boolean(text)
        return found == right, f"says {'yes' if found else 'no'}"

    return compare


def _text(gold: str, settings: Settings) -> Compare:
    if settings.options:
        right = words.find_option(gold, settings.options)

        def compare_option(text: str) -> tuple[bool, str]:
            found = words.find_option(text, settings.options or ())
            return found == right, f"names option {found + 1}"

        return compare_option
    folded = words.gold_text(gold)

    def compare(text: str) -> tuple[bool, str]:
        same = words.read_text(text) == folded
        return same, "the same words" if same else "other words"

    return compare


def _integer(gold: str, settings: Settings) -> Compare:
    if not quantity.read_quantity(gold).is_integer:
        raise Unreadable("is not a whole number")
    return _number(gold, settings)


def _number(gold: str, settings: Settings, *, in_percent: bool = False) -> Compare:
    right = quantity.read_quantity(gold, in_percent=in_percent)

    def compare(text: str) -> tuple[bool, str]:
        try:
            found = quantity.read_quantity(text, in_percent=in_percent)
        except Unreadable:
            stated = _number_of_a_sentence(text)
            if stated is not None:
                found = quantity.read_quantity(stated, in_percent=in_percent)
            elif ranges.is_range(text):
                raise
            elif looks_mathematical(text) and not right.label and not in_percent:
                name = leading_name(clean(text))[0]
                if right.name and name and right.name != name:
                    return False, f"{name} is not {right.name}"
                thousands = 1 if right.unit.dimensions else right.unit.factor  # `20K`
                return same_measured(_written(right.value * thousands), right.unit, text, settings.tolerance)
            else:
                raise
        return quantity.same_quantity(right, found, settings.tolerance)

    return compare


def _percent(gold: str, settings: Settings) -> Compare:
    return _number(gold, settings, in_percent=True)


def _time(gold: str, settings: Settings) -> Compare:
    right = clock.read_time(gold)
    return lambda text: clock.same_time(right, clock.read_time(text))


def _ratio(gold: str, settings: Settings) -> Compare:
    right = clock.read_ratio(gold)

    def compare(text: str) -> tuple[bool, str]:
        try:
            found = clock.read_ratio(text)
        except Unreadable:
            if len(right) != 2 or not right[1] or ("/" not in text and "frac" not in text):
                raise
            found = (quantity.read_quantity(text).value, Fraction(1))
            return right[0] / right[1] == found[0], "compared as a fraction"
        return found == right, "the ratios are equal" if found == right else "the ratios differ"

    return compare


def _several(
    read: Callable[[str], sequences.Group],
    same: Callable[[sequences.Group, sequences.Group, sequences.SameElement], tuple[bool, str]],
) -> Callable[[str, Settings], Compare]:
    def reader(gold: str, settings: Settings) -> Compare:
        right = read(gold)
        for element in right.elements:
            _read_element(element)

        def compare(text: str) -> tuple[bool, str]:
            if _of_words(right) and fold(clean(gold)) == fold(clean(text)):
                return True, "the same words"
            return same(right, read(text), _same_element(settings))

        return compare

    return reader


def _range(gold: str, settings: Settings) -> Compare:
    right = ranges.read_range(gold)
    return lambda text: ranges.same_range(right, ranges.read_range(text), settings.tolerance)


def _of_words(group: sequences.Group) -> bool:
    """`Washington, D.C.` and `October 5, 2020` are lists to the eye only: their commas say nothing."""
    return not group.opening and group.names is None and re.match(r"[A-Za-z]{3}", group.elements[0]) is not None


def _interval(gold: str, settings: Settings) -> Compare:
    right = sequences.read_intervals(gold)
    return lambda text: sequences.same_intervals(right, sequences.read_intervals(text), _same_element(settings))


def _expression(gold: str, settings: Settings) -> Compare:
    if not clean(gold):
        raise Unreadable("is empty")
    expression, unit = split_unit(gold)
    require_readable(expression)
    return lambda text: same_measured(expression, unit, text, settings.tolerance)


READERS: dict[str, Callable[[str, Settings], Compare]] = {
    "choice": _choice,
    "choices": _choices,
    "boolean": _boolean,
    "text": _text,
    "integer": _integer,
    "number": _number,
    "percent": _percent,
    "time": _time,
    "ratio": _ratio,
    "range": _range,
    "point": _several(sequences.read_group, sequences.same_point),
    "interval": _interval,
    "list": _several(sequences.read_group, sequences.same_list),
    "set": _several(sequences.read_group, sequences.same_set),
    "expression": _expression,
}


def _same_element(settings: Settings) -> sequences.SameElement:
    """Compare elements by the gold element's looks; without options, which belong to whole answers.

    Raises (when called): TimedOut and GoldUnreadable, which end the whole comparison.
    """

    def same(gold: str, prediction: str) -> bool:
        if clean(gold) == clean(prediction):
            return True
        try:
            if not _is_plain(gold):
                return same_expression(gold, prediction, settings.tolerance)[0]
            return READERS[infer_kind(gold)](gold, Settings(None, settings.tolerance))(prediction)[0]
        except TimedOut:
            raise
        except Unreadable:
            return False

    return same


def _read_element(element: str) -> None:
    """Refuse an element of a gold that could not be compared.

    Raises:
        Unreadable: empty, or an expression that math-verify cannot read.
    """
    if not clean(element):
        raise Unreadable("an element is empty")
    if not _is_plain(element):
        require_readable(element)


def _is_plain(text: str) -> bool:
    """Not for math-verify: a number, a word, a time, a nested list."""
    return infer_kind(text) != "expression"


def _same_option(option: str, prediction: str) -> bool:
    """Does this text say what the option says? Words by their letters; what has digits or signs by its value.

    Raises:
        TimedOut: math-verify took too long.
    """
    gold, text = clean(option), clean(prediction)
    if gold.casefold() == text.casefold():
        return True
    kind = infer_kind(gold)
    if kind in ("choice", "choices", "text") or (kind != "boolean" and not _VALUE.search(gold + " " + text)):
        return fold(gold) == fold(text)
    if kind == "expression" and not looks_mathematical(text):
        return False
    try:
        return READERS[kind](gold, Settings(None, None))(text)[0]
    except TimedOut:
        raise
    except (Unreadable, GoldUnreadable):
        return False


_VALUE = re.compile(r"[\d<>=+^*/\\√π±%]|(?<![^\W\d])-|-(?![^\W\d])")
_VERB = re.compile(r"(.{0,400})\b(is|are|equals|=)\s+(?:equal to |exactly )?(\S.{0,160})$")


def _number_of_a_sentence(text: str) -> str | None:
    """`The area is 12 cm` -> `12 cm`: what follows the last "is", where no digit stands before it and it is a number."""
    found = _VERB.match(text.replace("\n", " "))
    if found is None or re.search(r"\d", found[1]) or denies(found[1]) or doubts(text):
        return None
    try:
        quantity.read_quantity(found[3])
    except Unreadable:
        return None
    return found[3]


def _written(value: Fraction) -> str:
    """An exact number as LaTeX."""
    return str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
