"""`verify_answer`: extract, choose the kind by the gold, compare with the typed matcher, and only then with math-verify."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from metis_home.errors import RewardError

from . import quantity
from .expression import GoldUnreadable
from .extract import extract_answer
from .kinds import canonical_kind, infer_kind
from .matchers import READERS, Compare, Settings
from .normalise import clean, only_math_span
from .verdict import TimedOut, Unreadable, Verdict

MAX_GOLD = 2000  # characters
MAX_ANSWER = 2000  # of an extracted answer; longer is an essay
CACHE_SIZE = 65_536


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
    compare: Compare


@lru_cache(maxsize=CACHE_SIZE)
def _verify(
    answer: str, gold: str, kind: str | None, options: tuple[str, ...] | None, tolerance: float | str | None
) -> Verdict:
    read, problem = _read_gold(gold, kind, options, tolerance)
    if read is None:
        return Verdict(None, kind or "none", answer, f"gold: {problem}", "unparsed_gold")
    if clean(answer).endswith("?") and not any("?" in text for text in (gold, *(options or ()))):
        return Verdict(False, read.kind, answer, "asks instead of answering", "unparsed_prediction")
    candidates = [answer]
    if read.kind != "expression" or "$" in answer:
        span = only_math_span(answer)
        candidates += [span] if span is not None and span != answer.strip().strip("$") else []
    method, first_problem = read.kind, None
    differs: Verdict | None = None
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
        verdict = Verdict(correct, method, answer, reason)
        if correct or read.kind != "expression":
            return verdict
        differs = differs or verdict  # a sentence, read as a formula: its `$...$` may still be the answer
    return differs or Verdict(False, method, answer, f"no {read.kind}: {first_problem}", "unparsed_prediction")


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
        settings = Settings(options, _absolute(tolerance, text))
        return _Gold(chosen, text, READERS[chosen](text, settings)), None
    except Unreadable as error:
        return None, f"is no {chosen}: {error}"


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
