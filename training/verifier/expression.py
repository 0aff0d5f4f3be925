"""Expressions, compared by math-verify in its process pool, behind guards that keep bombs away from sympy."""

import re
from fractions import Fraction
from functools import lru_cache

from .equations import FUNCTIONS, is_relation, is_symbolic, stated
from .normalise import clean
from .pool import Comparison, shared_pool
from .quantity import read_quantity
from .verdict import TimedOut, Unreadable

MAX_LENGTH = 512  # characters
MAX_DEPTH = 20  # nested brackets; 300 take the parser 2 s
MAX_DIGITS = 60  # of one number
MAX_FACTORIAL = 170
MAX_EXPONENT_PRODUCT = 10_000  # of all numeric exponents: ((2^99)^99)^99 is as bad as 2^970299
NEAR = Fraction(1, 100)  # how far two sides of an "approximately equal" may be apart
CACHE_SIZE = 65_536

_MARKS = re.compile(
    rf"[\^_=+*/√π∞<>|]|\\[a-zA-Z]|(?<![a-zA-Z])(?:{FUNCTIONS})(?![a-zA-Z])|\d!|\)!|(?<![\w])[a-zA-Z]\(|\d\s?-\s?[\d(a-z]|^-[a-z(]"
)
_SHORT_PRODUCT = re.compile(r"-?\d+(?:\.\d+)?\s?(?:[a-zA-Z]\b\s?){1,3}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_BARE_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt\s?\(([^()]*)\)")
_BARE_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|pi)(?![a-zA-Z])"
)
_EXPONENT = re.compile(r"(?:\^|\*\*)\s?(?:\{\s?\(?\s?-?\s?(\d+)|\(\s?-?\s?(\d+)|-?\s?(\d+))")
_DECIMAL_EXPONENT = re.compile(r"\^\s?\{\s?(-?\d{0,6}\.\d{1,6})\s?\}")
_TOWER = re.compile(r"(?:\^|\*\*)\s?[({]*\s?-?\s?\d+\s?[)}]*\s?(?:\^|\*\*)")


def looks_mathematical(text: str) -> bool:
    """Is this an expression rather than words? `2x+1`, `3a` are; `blue`, `T-shirt`, `H2O` are not."""
    text = clean(text)
    words = [word for word in _WORD.findall(text) if not re.fullmatch(FUNCTIONS, word)]
    if words and not re.search(r"\\[a-zA-Z]", text):
        return False
    return _MARKS.search(text) is not None or _SHORT_PRODUCT.fullmatch(text) is not None


def same_expression(gold: str, prediction: str, tolerance: Fraction | None = None) -> tuple[bool, str]:
    """Are the two equal to math-verify? Of an equation that answers a gold without one, every side that it states.

    Raises:
        Unreadable: the prediction cannot be parsed, or a guard refuses it; `TimedOut` if it took too long.
        GoldUnreadable: the same for the gold.
    """
    text = clean(prediction)
    if not is_relation(text) or is_relation(clean(gold)):
        return _same_side(gold, prediction, tolerance)
    _guarded_gold(gold)
    guarded(prediction)
    sides = stated(text, with_formulas=not is_symbolic(clean(gold)))
    exact = (False, "")
    for side in sides.equal:
        exact = _same_side(gold, side, tolerance)
        if not exact[0]:
            break
    if not sides.near:
        return exact
    anchors = [gold] if exact[0] else [side for side in sides.near if _same_side(gold, side, tolerance)[0]]
    return _all_near(anchors[0], (*sides.equal, *sides.near)) if anchors else (False, "math-verify: not equal")


def _all_near(anchor: str, sides: tuple[str, ...]) -> tuple[bool, str]:
    """Does everything beside an "approximately equal" agree to 1 %, so that `\\sqrt{2} \\approx 7` claims nothing?"""
    for side in sides:
        if side == anchor:
            continue
        try:
            value = read_quantity(side).value
        except Unreadable:
            value = read_quantity(anchor).value
        verdict = _same_side(anchor, side, abs(value) * NEAR)
        if not verdict[0]:
            return verdict
    return True, "math-verify: equal"


def _same_side(gold: str, prediction: str, tolerance: Fraction | None) -> tuple[bool, str]:
    comparison = _compared(_guarded_gold(gold), guarded(prediction), None if tolerance is None else float(tolerance))
    if comparison.status == "gold_unreadable":
        raise GoldUnreadable("math-verify cannot parse it")
    if comparison.status == "gold_too_long":
        raise GoldUnreadable("takes math-verify too long")
    if comparison.status == "prediction_unreadable":
        raise Unreadable("math-verify cannot parse it")
    if comparison.status == "prediction_too_long":
        raise TimedOut(f"timed out: math-verify was stopped after {comparison.seconds:.1f} s")
    equal = comparison.status == "equal"
    return equal, "math-verify: equal" if equal else "math-verify: not equal"


def require_readable(gold: str) -> None:
    """Ask math-verify, once per gold, whether it can read it and compare it with itself in time.

    Raises:
        Unreadable: it cannot.
    """
    try:
        same_expression(gold, gold)
    except GoldUnreadable as error:
        raise Unreadable(str(error)) from None


class GoldUnreadable(Exception):
    """The gold, not the prediction, is what cannot be read."""


def guarded(text: str) -> str:
    """The text as math-verify shall see it, `$...$`.

    Raises:
        Unreadable: too long, too deep, an exponent or factorial too large: it would only cost time.
    """
    text = _as_latex(clean(text))
    if len(text) >= MAX_LENGTH:
        raise Unreadable(f"an expression of {len(text)} characters; at most {MAX_LENGTH - 1} are compared")
    if not text:
        raise Unreadable("there is no expression")
    _refuse_depth(text)
    _refuse_size(text)
    return f"${text}$"


def _guarded_gold(text: str) -> str:
    try:
        return guarded(text)
    except Unreadable as error:
        raise GoldUnreadable(str(error)) from None


@lru_cache(maxsize=CACHE_SIZE)
def _compared(gold: str, prediction: str, tolerance: float | None) -> Comparison:
    return shared_pool().compare(gold, prediction, tolerance)


def _as_latex(text: str) -> str:
    """Plain spellings that LaTeX does not know: `sqrt(2)`, `2**3`, `√2`, `2*x`, `pi`."""
    text = text.replace("**", "^").replace("·", "\\cdot ").replace("×", "\\times ").replace("π", "\\pi ")
    text = re.sub(r"√\s?\(([^()]*)\)|√\s?(\w+)", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"√\s?(?=\{)", r"\\sqrt", text)
    text = _DECIMAL_EXPONENT.sub(lambda m: rf"^{{{Fraction(m[1])}}}", text)  # sympy's floats are never exact
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _BARE_FUNCTION.sub(r"\\\1 ", text)
    return text.replace("$", "").replace("\\boxed", "").strip()


def _refuse_depth(text: str) -> None:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            raise Unreadable(f"brackets nested more than {MAX_DEPTH} deep")


def _refuse_size(text: str) -> None:
    if any(len(digits) > MAX_DIGITS for digits in re.findall(r"\d+", text)):
        raise Unreadable(f"a number of more than {MAX_DIGITS} digits")
    if _TOWER.search(text):
        raise Unreadable("a tower of numeric exponents")
    product = 1
    for groups in _EXPONENT.findall(text):
        product *= max(1, int(next(digits for digits in groups if digits)))
    if product > MAX_EXPONENT_PRODUCT:
        raise Unreadable(f"exponents whose product is above {MAX_EXPONENT_PRODUCT}")
    marks = text.count("!")
    if "!!" in text or marks > 4 or (marks > 1 and ")!" in text) or (marks and "^" in text.split("!", 1)[1]):
        raise Unreadable("factorials of factorials")
    if any(int(digits) > MAX_FACTORIAL for digits in re.findall(r"(\d+)\s?\)*!", text)):
        raise Unreadable(f"the factorial of a number above {MAX_FACTORIAL}")
