"""Answers in words: yes or no, one option of a closed vocabulary, a short text."""

import re
from collections.abc import Sequence

from .normalise import clean, fold
from .verdict import Unreadable

MAX_TEXT_WORDS = 12  # longer golds are sentences: no rule can tell a right paraphrase from a wrong one
_YES, _NO = ("yes", "true", "y", "correct"), ("no", "false", "n", "incorrect")
_BOOLEANS = dict.fromkeys(_YES, True) | dict.fromkeys(_NO, False)
# Inside a sentence only the unmistakable words count.
_IN_SENTENCE = dict.fromkeys(("yes", "true"), True) | dict.fromkeys(("no", "false"), False)
_NEGATIONS = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n't\b")


def read_boolean(text: str) -> bool:
    """`Yes`, `no.`, `True`; in a sentence exactly one of the two sides may be named.

    Raises:
        Unreadable: neither is named, both are, or the sentence negates.
    """
    folded = fold(clean(text))
    if folded in _BOOLEANS:
        return _BOOLEANS[folded]
    words = re.findall(r"[a-z']+", folded)
    named = {_IN_SENTENCE[word] for word in words if word in _IN_SENTENCE}
    if len(named) != 1:
        raise Unreadable("says both yes and no" if named else "says neither yes nor no")
    if re.search(r"\b(?:yes|no|true|false) or\b|\bor (?:yes|no|true|false)\b", folded):
        raise Unreadable("says yes or no, or something else")
    if _NEGATIONS.search(folded) and words[0] not in _IN_SENTENCE:
        raise Unreadable("negates: cannot tell yes from no")
    return named.pop()


def read_text(text: str) -> str:
    """Words, folded: lower case, without articles and punctuation.

    Raises:
        Unreadable: nothing is left.
    """
    folded = fold(clean(text))
    if not folded:
        raise Unreadable("there is no text")
    return folded


def gold_text(text: str) -> str:
    """`read_text` for a gold.

    Raises:
        Unreadable: it is a sentence, which no rule can verify.
    """
    folded = read_text(text)
    if len(folded.split()) > MAX_TEXT_WORDS:
        raise Unreadable(f"a text of more than {MAX_TEXT_WORDS} words cannot be verified by rule; use a judge")
    return folded


def find_option(text: str, options: Sequence[str]) -> int:
    """Which option the text is or names: exactly one.

    The whole text may be an option; else exactly one option may occur in it as whole words, where an option that is
    part of another (`red`, `dark red`) yields to the longer one.

    Raises:
        Unreadable: it names none, or several.
    """
    folded = fold(clean(text))
    names = [fold(clean(option)) for option in options]
    exact = [index for index, name in enumerate(names) if name == folded]
    if len(exact) == 1:
        return exact[0]
    found: dict[int, list[tuple[int, int]]] = {}
    for index, name in enumerate(names):
        if name and (spans := [match.span() for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", folded)]):
            found[index] = spans
    standing = [
        index
        for index, spans in found.items()
        if any(not any(_inside(span, other, found) for other in found if other != index) for span in spans)
    ]
    if exact or len(standing) != 1:
        raise Unreadable("names several options" if exact or standing else "names no option")
    if re.search(r"\bor\b", folded) and not re.search(r"\bor\b", names[standing[0]]):
        raise Unreadable("names an option or something else")
    if _NEGATIONS.search(folded) and not _NEGATIONS.search(names[standing[0]]):
        raise Unreadable("negates: cannot tell which option is meant")
    return standing[0]


def _inside(span: tuple[int, int], other: int, found: dict[int, list[tuple[int, int]]]) -> bool:
    """Is this place part of a longer mention of the other option?"""
    return any(start <= span[0] and span[1] <= end and end - start > span[1] - span[0] for start, end in found[other])
