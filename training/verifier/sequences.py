"""Answers with several parts: points, intervals, lists, sets, assignments. Parts are compared by the caller's rule."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from .normalise import clean
from .verdict import Unreadable

SameElement = Callable[[str, str], bool]  # (gold's element, prediction's element)

MAX_ELEMENTS = 64
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_NAMED = re.compile(r"([A-Za-z]\w{0,2}|\\[a-z]{2,8}|[A-Za-z]_\{?\w{1,3}\}?)\s?=\s?(\S.*)")
_INFINITE = re.compile(r"([-+]?)\s?(?:\\infty|infinity|inf|oo)", re.IGNORECASE)
_JOINTS = re.compile(r"\s*(?:,\s*|;\s*)?\b(?:and|or)\b\s*|\s*\\(?:lor|vee|land|wedge)\b\s*")


@dataclass(frozen=True, slots=True)
class Group:
    """Elements in order, with the brackets around them ("" for none)."""

    opening: str  # "(", "[", "{", "<" or ""
    closing: str
    elements: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...] | None:
        """The left sides, where every element is `name = value`."""
        found = [_NAMED.fullmatch(element) for element in self.elements]
        return tuple(match[1] for match in found if match) if self.elements and all(found) else None


@dataclass(frozen=True, slots=True)
class Interval:
    """Between two bounds, each an expression or `oo` with a sign; infinite bounds are open."""

    low: str
    high: str
    closed_low: bool
    closed_high: bool
    variable: str = ""  # of `x > 3`; "" where none is told


def read_group(text: str) -> Group:
    """Split `(1, 2)`, `[1, 2]`, `\\{1, 2\\}`, `1, 2`, `1 and 2`, `x = 1, y = 2`, `\\pm 3` at the outermost commas.

    Raises:
        Unreadable: empty parts, brackets that do not match, more than 64 elements.
    """
    opening, inner, closing = _brackets(clean(text))
    if opening == "{" and re.fullmatch(r"\s*|\\emptyset|\\varnothing", inner):
        return Group("{", "}", ())
    if not opening and inner in ("\\emptyset", "\\varnothing", "∅"):
        return Group("{", "}", ())
    elements: list[str] = []
    for element in split_commas(_JOINTS.sub(", ", inner) if _JOINTS.search(inner) else inner):
        if (both := re.fullmatch(r"(.*?=\s?)?(?:\\pm|±)\s?(\S.*)", element)) is not None:
            elements += [(both[1] or "") + both[2], (both[1] or "") + "-" + both[2]]
        else:
            elements.append(element)
    if not all(elements):
        raise Unreadable("a part of the list is empty")
    if len(elements) > MAX_ELEMENTS:
        raise Unreadable(f"a list of {len(elements)} elements; at most {MAX_ELEMENTS} are compared")
    return Group(opening, closing, tuple(elements))


def split_commas(text: str) -> list[str]:
    """Split at commas and semicolons outside brackets.

    Where elements are separated by `, ` or `;`, a comma inside `1,000` belongs to the number.
    """
    text = text.strip()
    spaced = re.search(r",\s|;", text) is not None
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and character in ",;":
            thousands = character == "," and spaced and re.match(r",\d{3}(?!\d)", text[position:])
            if thousands and re.search(r"(?<!\d)\d{1,3}$", text[start:position][-4:].replace(",", "")[-3:]):
                continue
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def same_list(gold: Group, prediction: Group, same: SameElement) -> tuple[bool, str]:
    """The same elements in the same order; `x = 1, y = 2` may come in any order of names."""
    if len(gold.elements) != len(prediction.elements):
        return False, f"{len(prediction.elements)} elements, expected {len(gold.elements)}"
    names, other_names = gold.names, prediction.names
    golds, predictions = _values(gold), _values(prediction)
    if names is not None and other_names is not None:
        if len(set(names)) < len(names) or set(names) != set(other_names):
            return False, "names other variables"
        order = [other_names.index(name) for name in names]
        predictions = [predictions[index] for index in order]
    for number, (wanted, found) in enumerate(zip(golds, predictions, strict=True), start=1):
        if not same(wanted, found):
            return False, f"element {number} differs"
    return True, "all elements are equal"


def same_set(gold: Group, prediction: Group, same: SameElement) -> tuple[bool, str]:
    """Every element of each side is one of the other's; order and repetition do not count.

    `(1, 2)` is a point and `[1, 2]` an interval; a longer list in square brackets is how programs write sets.
    """
    if prediction.opening in ("(", "<") or prediction.closing == ")":
        return False, "is a point or an interval"
    if prediction.opening == "[" and len(prediction.elements) == 2:
        return False, "is an interval"
    golds, predictions = _values(gold), _values(prediction)
    matched: set[int] = set()
    for found in predictions:
        index = next((index for index, wanted in enumerate(golds) if wanted == found or same(wanted, found)), None)
        if index is None:
            return False, f"{found[:40]!r} does not belong to it"
        matched.add(index)
    missing = [golds[index] for index in range(len(golds)) if index not in matched]
    missing = [one for one in missing if not any(one == golds[index] or same(golds[index], one) for index in matched)]
    return not missing, f"{len(missing)} elements are missing" if missing else "the sets are equal"


def same_point(gold: Group, prediction: Group, same: SameElement) -> tuple[bool, str]:
    """Coordinates in order; the brackets of a point may be round, angled or left out."""
    if prediction.opening not in ("(", "<", "") or prediction.closing not in (")", ">", ""):
        return False, "is not a point"
    return same_list(gold, prediction, same)


def read_intervals(text: str) -> tuple[Interval, ...]:
    """`[1, 2)`, `x \\in (1, 2]`, `1 < x \\le 2`, `x > 3`, `(-\\infty, 1) \\cup (2, \\infty)`.

    Raises:
        Unreadable: it is none of these.
    """
    text = clean(text)
    membership = re.match(r"([A-Za-z]\w?)\s?(?:\\in|:)\s?", text)
    variable, text = (membership[1], text[membership.end() :]) if membership else ("", text)
    intervals = (_one_interval(part.strip()) for part in re.split(r"\s?\\cup\s?|\s+or\s+", text))
    return tuple(replace(one, variable=one.variable or variable) for one in intervals)


def same_intervals(gold: tuple[Interval, ...], prediction: tuple[Interval, ...], same: SameElement) -> tuple[bool, str]:
    """The same intervals in any order."""
    if len(gold) != len(prediction):
        return False, f"{len(prediction)} intervals, expected {len(gold)}"
    left = list(prediction)
    for wanted in gold:
        index = next((index for index, found in enumerate(left) if _same_interval(wanted, found, same)), None)
        if index is None:
            return False, "the intervals differ"
        del left[index]
    return True, "the intervals are equal"


def _same_interval(gold: Interval, prediction: Interval, same: SameElement) -> bool:
    if gold.variable and prediction.variable and gold.variable != prediction.variable:
        return False
    if (gold.closed_low, gold.closed_high) != (prediction.closed_low, prediction.closed_high):
        return False
    for wanted, found in ((gold.low, prediction.low), (gold.high, prediction.high)):
        if wanted.endswith("oo") or found.endswith("oo"):
            if wanted != found:
                return False
        elif not same(wanted, found):
            return False
    return True


def _one_interval(text: str) -> Interval:
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        bounds = split_commas(text[1:-1])
        if len(bounds) != 2 or not all(bounds):
            raise Unreadable("is not an interval")
        low, high = (_bound(bound) for bound in bounds)
        return Interval(low, high, text[0] == "[" and low != "-oo", text[-1] == "]" and high != "oo")
    parts = re.split(r"\s?(\\le|\\ge|<=|>=|<|>)\s?", text)
    signs = [{"\\le": "<=", "\\ge": ">="}.get(sign, sign) for sign in parts[1::2]]
    terms = parts[::2]
    if not all(terms) or len(signs) not in (1, 2) or len({sign[0] for sign in signs}) != 1:
        raise Unreadable("is not an interval")
    if signs[0][0] == ">":
        terms, signs = terms[::-1], signs[::-1]
    closed = [len(sign) == 2 for sign in signs]
    if len(terms) == 3:
        if not _is_variable(terms[1]):
            raise Unreadable("is not an interval of one variable")
        low, high = _bound(terms[0]), _bound(terms[2])
        return Interval(low, high, closed[0] and low != "-oo", closed[1] and high != "oo", terms[1])
    if _is_variable(terms[0]) == _is_variable(terms[1]):
        raise Unreadable("is not an interval of one variable")
    if _is_variable(terms[0]):  # x < 3
        return Interval("-oo", _bound(terms[1]), False, closed[0], terms[0])
    return Interval(_bound(terms[0]), "oo", closed[0], False, terms[1])


def _is_variable(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z](?:_\{?\w\}?)?|\\(?:theta|alpha|beta|lambda|phi|mu|omega)", text.strip()) is not None


def _bound(text: str) -> str:
    text = text.strip()
    infinite = _INFINITE.fullmatch(text)
    return ("-" if infinite[1] == "-" else "") + "oo" if infinite else text


def _values(group: Group) -> list[str]:
    """Elements; without their names where all have one."""
    if group.names is None:
        return list(group.elements)
    return [match[2] for element in group.elements if (match := _NAMED.fullmatch(element))]


def _brackets(text: str) -> tuple[str, str, str]:
    """Opening, inside, closing; all of it inside and no brackets where none encloses the whole."""
    text = re.sub(r"^\\langle\s?(.*?)\s?\\rangle$", r"<\1>", text.replace("\\{", "{").replace("\\}", "}"))
    if text[:1] == "<" and text[-1:] == ">" and "," in text:
        return "<", text[1:-1], ">"
    if len(text) < 2 or text[0] not in _PAIRS or text[-1] not in ")]}":
        return "", text, ""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and position < len(text) - 1:
            return "", text, ""  # (1,2), (3,4)
    if depth != 0:
        raise Unreadable("brackets that do not match")
    return text[0], text[1:-1], text[-1]
