r"""Equations as answers: `x = 4`, `\angle A = 60^\circ`, `Area: 12`, `20 + 40 = 60`, `\sqrt{2} \approx 1.41`.

What stands left of the sign is either the name of what was asked for, or has to have the answer's value as well:
`3x = 4` and `5 = 4` state nothing about 4.
"""

import re
from dataclasses import dataclass

from .hedges import denies, doubts
from .verdict import Unreadable

FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|pi|min|max|lim|mod"
_GREEK = "alpha|beta|gamma|delta|theta|phi|varphi|psi|omega|lambda|mu|sigma|rho|tau|epsilon|varepsilon|eta|Delta"
_INDEX = r"(?:\s?_\s?(?:\{[^{}]{1,12}\}|\w))?"
_POINTS = r"(?:[A-Z]'?){1,4}"
_SYMBOL = rf"(?:[A-Za-z]\d{{0,2}}'*|\\(?:{_GREEK})(?![a-zA-Z])){_INDEX}"
_GEOMETRIC = (
    rf"(?:m\s?)?\\(?:angle|triangle|overline|overrightarrow|widehat|arc)\s?\{{?\s?(?:{_POINTS}|[a-z\d]|\\(?:{_GREEK}))\s?\}}?"
    rf"|\|\s?{_POINTS}\s?\||{_POINTS}"
)
_OBJECT = rf"(?:{_GEOMETRIC}|{_SYMBOL})"
# `f(2)`, `P(A)`, `\sin A`; but `x(x + 1)` is a product.
_APPLIED = (
    r"[A-WZa-w]'*\s?\([^()=]{1,20}\)"
    r"|\\frac\s?\{\s?[A-Z]{2}\s?\}\s?\{\s?[A-Z]{2}\s?\}"
    rf"|\\?(?:sin|cos|tan|cot|sec|csc)\s?(?:\^\s?\{{?\s?-?\d\s?\}}?)?\s?\(?\s?{_OBJECT}\s?\)?"
)
_NAME = re.compile(rf"{_APPLIED}|{_OBJECT}")
_SHORT_WORDS = "sum|age|ans|gcd|lcm|hcf|avg"
_WORDS = re.compile(
    rf"(?!.*\b(?:sqrt|log|ln|exp|pi|sin|cos|tan)\b)(?=.*[A-Za-z]{{4}}|(?:{_SHORT_WORDS})\b)"
    rf"[A-Za-z][A-Za-z'-]*(?:\s(?:[A-Za-z][A-Za-z'-]*|{_OBJECT})){{0,8}}"
)
_SIGN = re.compile(r"(?<![<>=!])=(?!=)|\\approx(?![a-z])")
_OTHER_RELATION = re.compile(r"[<>]|\\(?:le|ge|neq?|not|equiv|sim|cong|parallel|perp|in|to)(?![a-z])")
_IMPLIES = re.compile(r"\\(?:Rightarrow|Longrightarrow|implies)(?![a-zA-Z])|⇒")
_LEFT_SIDE = re.compile(r"\s?(?P<sign>=|\\approx(?![a-z])|:)\s?")
MAX_SIDES = 8  # each may take math-verify its whole time
_LONGEST_NAME = 60  # characters
_SYMBOLIC = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{FUNCTIONS})(?![a-zA-Z]))[a-zA-Z]|\\(?:{_GREEK})(?![a-zA-Z])")


@dataclass(frozen=True, slots=True)
class Stated:
    """What an equation says the answer is."""

    equal: tuple[str, ...]  # each must be the answer
    near: tuple[str, ...]  # sides behind an "approximately equal"


def is_name(text: str) -> bool:
    r"""Can this be the name of what was asked for: `x`, `AB`, `\angle A`, `f(2)`, `\sin A`, `the area of ABC`?"""
    text = text.strip()
    if not text or len(text) > _LONGEST_NAME:
        return False
    if _NAME.fullmatch(text) is not None:
        return True
    return _WORDS.fullmatch(text) is not None and not denies(text) and not doubts(text)


def leading_name(text: str) -> tuple[str, str]:
    r"""`x = 4` -> `("x", "4")`, `Area: 12` -> `("", "12")`, `= 4` -> `("", "4")`; no name is `("", text)`.

    A name in words claims nothing and is "", for it has many spellings.
    """
    sign = _LEFT_SIDE.search(text)
    if sign is None:
        return "", text
    left, right = text[: sign.start()].strip(), text[sign.end() :]
    if not left and sign["sign"] != ":":
        return "", right
    if not is_name(left):
        return "", text
    is_words = _NAME.fullmatch(left) is None
    if sign["sign"] == ":" and not is_words:
        return "", text  # `A: 12` is an option, `x: 3` a ratio
    return "" if is_words else re.sub(r"[\s\\{}()|]|^m(?=\s?\\)", "", left), right


def is_symbolic(text: str) -> bool:
    """Has it letters of its own, so that it has no one value?"""
    return _SYMBOLIC.search(text) is not None


def is_relation(text: str) -> bool:
    """Does it say how two things compare, by `=`, `<` or a sign like these?"""
    return _SIGN.search(text) is not None or _OTHER_RELATION.search(text) is not None


def stated(text: str, *, with_formulas: bool) -> Stated:
    r"""The sides of an equation that must be the answer.

    Names are left out at both ends. Of `3x = 9 \Rightarrow x = 3` the conclusion counts.

    Args:
        with_formulas: after a name a formula may stand, `A = \pi r^2 = 4\pi`: sides with letters of their own, other than
            the last, are left out too.
    Raises:
        Unreadable: it has no side with a value, or another relation than equality.
    """
    text = _IMPLIES.split(text)[-1].strip()
    if _OTHER_RELATION.search(text) is not None:
        raise Unreadable("is an inequality or another relation")
    parts = [part.strip() for part in _SIGN.split(text)]
    near = [sign == "\\approx" for sign in _SIGN.findall(text)]
    sides = list(zip(parts, [False, *near], strict=True))
    sides = sides[1:] if not sides[0][0] else sides  # "= 4"
    named = bool(sides) and is_name(sides[0][0])
    sides = sides[1:] if named else sides
    if not named and len(sides) > 1 and is_name(sides[-1][0]):
        sides = sides[:-1]
    if named and with_formulas:
        sides = [side for side in sides[:-1] if not is_symbolic(side[0])] + sides[-1:]
    if len(sides) > MAX_SIDES:
        raise Unreadable(f"is an equation of more than {MAX_SIDES} sides")
    if not sides or not all(side for side, _ in sides):
        raise Unreadable("is an equation without a value")
    return Stated(tuple(s for s, is_near in sides if not is_near), tuple(s for s, is_near in sides if is_near))
