"""The kinds of gold answers: their names, and which one a gold without a kind has."""

import re
from collections.abc import Sequence

from metis_home.errors import RewardError

from .choice import LETTERS, read_gold_choice
from .clock import read_time
from .expression import looks_mathematical
from .normalise import clean
from .quantity import read_quantity
from .ranges import is_range
from .sequences import Group, read_group, read_intervals
from .verdict import Unreadable
from .words import find_option

KINDS = (
    "choice", "choices", "boolean", "text", "integer", "number", "percent", "time", "ratio", "range", "point",
    "interval", "list", "set", "expression",
)  # fmt: skip
# Names that data sets use.
_OTHER_NAMES = {
    "multiple_choice": "choice", "mcq": "choice", "option": "choice", "letter": "choice",
    "yes_no": "boolean", "bool": "boolean", "word": "text", "vocabulary": "text", "string": "text",
    "int": "integer", "count": "integer", "float": "number", "decimal": "number", "fraction": "number",
    "percentage": "percent", "coordinates": "point", "tuple": "point", "math": "expression", "latex": "expression",
}  # fmt: skip
_BOOLEAN = re.compile(r"yes|no|true|false", re.IGNORECASE)
# Grades, blood groups, languages, ages above 65; a sign of comparison; a statement of geometry. Formulas to the eye only.
_SIGNS = re.compile(r"[A-Za-z]{1,3}[+#-]{1,2}|\d+\+|[<>=]|\\[lg]e|.+\\(?:parallel|perp|cong|sim)(?![a-z]).+")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")


def canonical_kind(kind: str) -> str:
    """The name of a kind in `KINDS`.

    Raises:
        RewardError: there is no such kind.
    """
    name = kind.strip().lower().replace("-", "_").replace(" ", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in KINDS:
        import difflib

        near = difflib.get_close_matches(name, [*KINDS, *_OTHER_NAMES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"unknown kind of answer {kind!r}; known: {', '.join(KINDS)}.{hint}")
    return name


def infer_kind(gold: str, options: Sequence[str] | None = None) -> str:
    """What kind of answer this gold is, by its looks; `docs/rewards.md` has the table. Never raises."""
    text = clean(gold)
    if options and len(options) > len(LETTERS) and _reads(lambda: find_option(gold, options)):
        return "text"
    if options and _reads(lambda: read_gold_choice(gold, options)):
        return "choice"
    if re.fullmatch(r"\(?[A-H]\)?|[A-H][.:)] .*|\([A-H]\) .*", text, re.DOTALL):
        return "choice"
    if re.fullmatch(r"[A-H](?:\s?,\s?[A-H])+", text):
        return "choices"
    if re.fullmatch(r"A?B?C?D?E?F?G?H?", text) and len(text) > 1:
        return "choices"
    if _BOOLEAN.fullmatch(text):
        return "boolean"
    if _reads(lambda: read_quantity(text)):
        return "number"
    if _reads(lambda: read_time(text)):
        return "time"
    if re.fullmatch(r"\d+(?:\.\d+)?(?:\s?:\s?\d+(?:\.\d+)?){1,5}", text):
        return "ratio"
    if _DATE.fullmatch(text):
        return "text"
    if _SIGNS.fullmatch(text):
        return "text"
    if is_range(text):
        return "range"
    return _kind_of_several(text) or ("expression" if looks_mathematical(text) else "text")


def _kind_of_several(text: str) -> str | None:
    if re.search(r"\\cup|\\in(?![a-z])|<|>|\\le |\\ge |\\infty", text) and _reads(lambda: read_intervals(text)):
        return "interval"
    try:
        group = read_group(text)
    except Unreadable:
        return "interval" if _reads(lambda: read_intervals(text)) else None
    if group.opening == "{":
        return "set"
    if len(group.elements) < 2:
        return None
    if group.opening + group.closing in ("[]", "(]", "[)") and len(group.elements) == 2:
        return "interval"
    if group.opening in ("(", "<"):
        return "point"
    names = group.names
    if names is not None and len(set(names)) < len(names):
        return "set"
    if re.search(r"\b(?:and|or)\b|\\pm|±|\\lor|\\vee", text):
        return "set" if _mathematical(group) else None
    return "list" if _mathematical(group) or _short(group) else None


def _mathematical(group: Group) -> bool:
    return all(
        _reads(lambda e=element: read_quantity(e)) or looks_mathematical(element) or re.fullmatch("[a-zA-Z]", element)
        for element in group.elements
    )


def _short(group: Group) -> bool:
    return all(len(element.split()) <= 4 for element in group.elements)


def _reads(read: object) -> bool:
    try:
        read()  # type: ignore[operator]
    except Unreadable:
        return False
    return True


__all__ = ["KINDS", "LETTERS", "canonical_kind", "infer_kind"]
