"""`verify_answer`: extract, choose the kind by the gold, compare with the typed matcher, and only then with math-verify."""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from metis_home.errors import RewardError

from . import choice, clock, quantity, sequences, words
from .expression import GoldUnreadable, looks_mathematical, require_readable, same_expression
from .extract import extract_answer
from .kinds import canonical_kind, infer_kind
from .normalise import clean, fold, only_math_span
from .verdict import TimedOut, Unreadable, Verdict

MAX_GOLD = 2000  # characters
MAX_ANSWER = 2000  # of an extracted answer; longer is an essay
CACHE_SIZE = 65_536


@dataclass(frozen=True, slots=True)
class _Settings:
    options: tuple[str, ...] | None
    tolerance: Fraction | None


def verify_answer(
    prediction: str,
    gold: str,
    kind: str | None = None,
    *,
    options: Sequence[str] | None = None,
    tolerance: float | str | None = None,
) -> Verdict:
    """Is the answer in a generated text the gold answer?

    Safe in any thread, and never raises on what a model wrote; asyncio code awaits `verify_answer_async`.

    Args:
        prediction: generated text, with or without tags and box; see `extract_answer`.
        gold: the right answer, bare or in a box.
        kind: one of `KINDS`, or None to go by the gold's looks.
        options: texts of a multiple-choice question in order, or the closed vocabulary of a `text` question.
        tolerance: largest difference for numbers, absolute (`0.01`) or relative to the gold (`"5%"`). None: whole
            numbers are exact, others agree to six digits behind the point.
    Returns:
        A verdict; `correct` is None where the gold cannot be read, and never for another reason.
    Raises:
        RewardError: unknown kind or unreadable tolerance: mistakes in the data, which `gold_problem` lists beforehand.
        EngineError: an expression must be compared and math-verify is not installed.
    """
    name = None if kind is None else canonical_kind(kind)
    extraction = extract_answer(prediction)
    if extraction.text is None or len(extraction.text) > MAX_ANSWER:
        _, problem = _read_gold(gold, name, _freeze(options), tolerance)
        if problem is not None:
            return Verdict(None, name or "none", None, f"gold: {problem}", "unparsed_gold")
        reason = extraction.reason if extraction.text is None else f"an answer of {len(extraction.text)} characters"
        return Verdict(False, "none", None, reason, "no_answer")
    return _verify(extraction.text, gold, name, _freeze(options), tolerance)


async def verify_answer_async(
    prediction: str,
    gold: str,
    kind: str | None = None,
    *,
    options: Sequence[str] | None = None,
    tolerance: float | str | None = None,
) -> Verdict:
    """`verify_answer` for asyncio: the loop goes on while a process compares."""
    return await asyncio.to_thread(verify_answer, prediction, gold, kind, options=options, tolerance=tolerance)


def gold_problem(
    gold: str,
    kind: str | None = None,
    *,
    options: Sequence[str] | None = None,
    tolerance: float | str | None = None,
) -> str | None:
    """Why this gold can never be scored, or None if it can.

    For data checks before training: reads the gold, and compares it with itself where math-verify has to do it.

    Raises:
        EngineError: an expression must be compared and math-verify is not installed.
    """
    try:
        name = None if kind is None else canonical_kind(kind)
        read, problem = _read_gold(gold, name, _freeze(options), tolerance)
    except RewardError as error:
        return str(error)
    if read is None:
        return problem
    verdict = verify_answer(read.text, gold, kind, options=options, tolerance=tolerance)
    return None if verdict.correct else verdict.reason


@dataclass(frozen=True, slots=True)
class _Gold:
    kind: str
    text: str
    compare: "Callable[[str], tuple[bool, str]]"  # raises Unreadable for the prediction, GoldUnreadable for the gold


@lru_cache(maxsize=CACHE_SIZE)
def _verify(
    answer: str, gold: str, kind: str | None, options: tuple[str, ...] | None, tolerance: float | str | None
) -> Verdict:
    read, problem = _read_gold(gold, kind, options, tolerance)
    if read is None:
        return Verdict(None, kind or "none", answer, f"gold: {problem}", "unparsed_gold")
    candidates = [answer]
    if read.kind != "expression" or "$" in answer:
        span = only_math_span(answer)
        candidates += [span] if span is not None and span != answer.strip().strip("$") else []
    method, first_problem = read.kind, None
    for candidate in candidates:
        try:
            correct, reason = read.compare(candidate)
        except TimedOut as error:
            return Verdict(False, "expression", answer, str(error), "timed_out")
        except GoldUnreadable as error:
            return Verdict(None, "expression", answer, f"gold: {error}", "unparsed_gold")
        except Unreadable as error:
            first_problem = first_problem or str(error)
            continue
        method = "expression" if reason.startswith("math-verify") else read.kind
        return Verdict(correct, method, answer, reason)
    return Verdict(False, method, answer, f"no {read.kind}: {first_problem}", "unparsed_prediction")


@lru_cache(maxsize=CACHE_SIZE)
def _read_gold(
    gold: str, kind: str | None, options: tuple[str, ...] | None, tolerance: float | str | None
) -> tuple[_Gold | None, str | None]:
    """The gold with its comparison, or why it cannot be read."""
    if not isinstance(gold, str) or not gold.strip():
        return None, "is empty"
    extraction = extract_answer(gold)
    text = extraction.text
    if text is None:
        return None, extraction.reason
    if len(text) > MAX_GOLD:
        return None, f"has {len(text)} characters"
    chosen = kind or infer_kind(text, options)
    try:
        settings = _Settings(options, _absolute(tolerance, text))
        return _Gold(chosen, text, _READERS[chosen](text, settings)), None
    except Unreadable as error:
        return None, f"is no {chosen}: {error}"


def _choice(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    right = choice.read_gold_choice(gold, settings.options)
    return lambda text: choice.same_choice(right, text, _same_plain)


def _choices(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    right = choice.read_letters(gold)

    def compare(text: str) -> tuple[bool, str]:
        found = choice.read_letters(text)
        return found == right, f"chooses {', '.join(sorted(found))}"

    return compare


def _boolean(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    right = words.read_boolean(gold)

    def compare(text: str) -> tuple[bool, str]:
        found = words.read_boolean(text)
        return found == right, f"says {'yes' if found else 'no'}"

    return compare


def _text(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
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


def _integer(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    if not quantity.read_quantity(gold).is_integer:
        raise Unreadable("is not a whole number")
    return _number(gold, settings)


def _number(gold: str, settings: _Settings, *, in_percent: bool = False) -> Callable[[str], tuple[bool, str]]:
    right = quantity.read_quantity(gold, in_percent=in_percent)

    def compare(text: str) -> tuple[bool, str]:
        try:
            found = quantity.read_quantity(text, in_percent=in_percent)
        except Unreadable:
            stated = _number_of_a_sentence(text)
            if stated is not None:
                found = quantity.read_quantity(stated, in_percent=in_percent)
            elif looks_mathematical(text) and right.unit.is_bare and not right.label and not in_percent:
                return same_expression(_written(right.value), text, settings.tolerance)
            else:
                raise
        return quantity.same_quantity(right, found, settings.tolerance)

    return compare


def _percent(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    return _number(gold, settings, in_percent=True)


def _time(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    right = clock.read_time(gold)
    return lambda text: clock.same_time(right, clock.read_time(text))


def _ratio(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
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
) -> Callable[[str, _Settings], Callable[[str], tuple[bool, str]]]:
    def reader(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
        right = read(gold)
        for element in right.elements:
            _read_element(element)
        return lambda text: same(right, read(text), _same_element(settings))

    return reader


def _interval(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    right = sequences.read_intervals(gold)
    return lambda text: sequences.same_intervals(right, sequences.read_intervals(text), _same_element(settings))


def _expression(gold: str, settings: _Settings) -> Callable[[str], tuple[bool, str]]:
    if not clean(gold):
        raise Unreadable("is empty")
    require_readable(gold)
    return lambda text: same_expression(gold, text, settings.tolerance)


_READERS: dict[str, Callable[[str, _Settings], Callable[[str], tuple[bool, str]]]] = {
    "choice": _choice,
    "choices": _choices,
    "boolean": _boolean,
    "text": _text,
    "integer": _integer,
    "number": _number,
    "percent": _percent,
    "time": _time,
    "ratio": _ratio,
    "point": _several(sequences.read_group, sequences.same_point),
    "interval": _interval,
    "list": _several(sequences.read_group, sequences.same_list),
    "set": _several(sequences.read_group, sequences.same_set),
    "expression": _expression,
}


def _same_element(settings: _Settings) -> sequences.SameElement:
    """Compare elements by the gold element's looks; without options, which belong to whole answers.

    Raises (when called): TimedOut and GoldUnreadable, which end the whole comparison.
    """

    def same(gold: str, prediction: str) -> bool:
        if clean(gold) == clean(prediction):
            return True
        try:
            if not _is_plain(gold):
                return same_expression(gold, prediction, settings.tolerance)[0]
            return _READERS[infer_kind(gold)](gold, _Settings(None, settings.tolerance))(prediction)[0]
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


def _same_plain(gold: str, prediction: str) -> bool:
    """Equal by the typed matchers alone: the texts of options, which may be numbers. Never reaches math-verify."""
    kind = infer_kind(gold)
    if kind in ("expression", "choice", "choices"):
        return fold(clean(gold)) == fold(clean(prediction))
    try:
        if kind == "number":
            return quantity.same_quantity(quantity.read_quantity(gold), quantity.read_quantity(prediction))[0]
        if kind in ("time", "ratio", "boolean"):
            return _READERS[kind](gold, _Settings(None, None))(prediction)[0]
    except Unreadable:
        return False
    return fold(clean(gold)) == fold(clean(prediction))


_VERB = re.compile(r"(.{0,400})\b(is|are|equals|=)\s+(?:equal to |exactly )?(\S.{0,160})$")


def _number_of_a_sentence(text: str) -> str | None:
    """`The area is 12 cm` -> `12 cm`: what follows the last "is", where no digit stands before it and it is a number."""
    found = _VERB.match(text.replace("\n", " "))
    if found is None or re.search(r"\d", found[1]):
        return None
    try:
        quantity.read_quantity(found[3])
    except Unreadable:
        return None
    return found[3]


def _written(value: Fraction) -> str:
    """An exact number as LaTeX."""
    return str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _absolute(tolerance: float | str | None, gold: str) -> Fraction | None:
    """The tolerance in the gold's unit.

    Raises:
        RewardError: it is not a number or a percentage above or equal to zero.
        Unreadable: relative to a gold that is no number.
    """
    if tolerance is None:
        return None
    text = str(tolerance).strip()
    try:
        value = Fraction(text.removesuffix("%").strip())
    except (ValueError, ZeroDivisionError):
        raise RewardError(
            f'tolerance {tolerance!r}: expected a number such as 0.01, or a share such as "5%".'
        ) from None
    if value < 0:
        raise RewardError(f"tolerance {tolerance!r} is negative.")
    return abs(quantity.read_quantity(gold).value) * value / 100 if text.endswith("%") else value


def _freeze(options: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(str(option) for option in options) if options else None
