"""Answers in words: yes or no, one option of a closed vocabulary, a short text."""

import re
from collections.abc import Sequence

from .hedges import denies, doubts
from .normalise import clean, fold
from .verdict import Unreadable

MAX_TEXT_WORDS = 12  # longer golds are sentences: no rule can tell a right paraphrase from a wrong one
_YES, _NO = ("yes", "true", "y", "correct"), ("no", "false", "n", "incorrect")
_BOOLEANS = dict.fromkeys(_YES, True) | dict.fromkeys(_NO, False)
_SIDES = dict.fromkeys(("yes", "yeah", "yep", "true"), True) | dict.fromkeys(("no", "nope", "nah", "false"), False)
_SIDE = "|".join(_SIDES)
# "No, ..." and "no it is not" decide; "no idea", "no car" do not.
_FIRST = re.compile(
    rf"\W*({_SIDE})(?:\s*(?:[,.;:!\n]|-\s|$)"
    r"|\s+(?=(?:because|since|it|they|he|she|there|this|that|these|those|the|i|we|you|not)\b))"
)
# Inside a sentence a "no" before a noun denies the noun.
_INSIDE = re.compile(rf"\b(?:(?!no\b)(?:{_SIDE})\b|no\b(?=\W*$|[,.;:!]|\s+(?:because|since|or)\b))")
_OTHERWISE = re.compile(rf"\b(?:{_SIDE}) or\b|\bor (?:{_SIDE})\b")


def read_boolean(text: str) -> bool:
    """`Yes`, `no.`, `True`; of a sentence its first word decides, else exactly one of the two sides may be named.

    Raises:
        Unreadable: neither is named, both are, or the sentence negates or doubts.
    """
    cleaned = clean(text).casefold()
    folded = fold(cleaned)
    if folded in _BOOLEANS:
        return _BOOLEANS[folded]
    first = _FIRST.match(cleaned)
    if first is not None:
        side, rest = _SIDES[first[1]], cleaned[first.end() :]
        if _contradicts(rest, side):
            raise Unreadable("says yes or no, and takes it back")
        return side
    named = {_SIDES[word] for word in _INSIDE.findall(cleaned)}
    if len(named) != 1:
        raise Unreadable("says both yes and no" if named else "says neither yes nor no")
    if _OTHERWISE.search(folded):
        raise Unreadable("says yes or no, or something else")
    if doubts(cleaned) or denies(re.sub(r"\bfalse\b", "", cleaned)):
        raise Unreadable("negates or doubts: cannot tell yes from no")
    return named.pop()


def _contradicts(rest: str, side: bool) -> bool:
    """Does what follows the first word say the opposite? `Yes. No.`, `No, yes`, `Yes, that is false`, `Yes, maybe`."""
    if doubts(rest) or re.match(r"\s*or\b", rest):
        return True
    decided = [_FIRST.match(clause) for clause in re.split(r"[,.;:!?\n]|\bbut\b|\bactually\b", rest)]
    if any(found is not None and _SIDES[found[1]] != side for found in decided):
        return True
    opposite = r"\b(?:nope|nah|false)\b" if side else r"\b(?:yes|yeah|yep|true)\b"
    return re.search(rf"(?<!not )(?<!n't ){opposite}", rest) is not None


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

    The whole text may be an option; else exactly one option may occur in it, see `named_options`.

    Of two options that say yes and no, `read_boolean` chooses.

    Raises:
        Unreadable: it names none, or several, or takes back what it names.
    """
    folded = fold(clean(text))
    names = [fold(clean(option)) for option in options]
    exact = [index for index, name in enumerate(names) if name == folded]
    if len(exact) == 1:
        return exact[0]
    sides = [_BOOLEANS.get(name) for name in names]
    if set(sides) == {True, False} and len(sides) == 2:  # to look for a "no" would find "no idea"
        return sides.index(read_boolean(text))
    standing = named_options(text, options)
    if exact or len(standing) != 1:
        raise Unreadable("names several options" if exact or standing else "names no option")
    index = standing.pop()
    refuse_hedges(text, options[index])
    return index


def named_options(text: str, options: Sequence[str]) -> set[int]:
    """Options that occur in the text as whole words; one that is part of another (`red`, `dark red`) yields to it.

    A sign is part of a word: `3` does not occur in `-3`, nor `y=x` in `y=x+2`. A formula in LaTeX never occurs: its
    signs are not words.
    """
    folded = fold(clean(text))
    found: dict[int, list[tuple[int, int]]] = {}
    for index, option in enumerate(options):
        place = _place(option)
        if place is not None and (spans := [match.span() for match in place.finditer(folded)]):
            found[index] = spans
    return {
        index
        for index, spans in found.items()
        if any(not any(_inside(span, other, found) for other in found if other != index) for span in spans)
    }


def refuse_hedges(text: str, option: str) -> None:
    """Look at what stands around this option in the text.

    Raises:
        Unreadable: it denies the option, doubts it, or offers something else.
    """
    place, around = _place(option), fold(clean(text))
    around = place.sub(" ", around) if place is not None else around
    if re.search(r"\bor\b", around):
        raise Unreadable("names an option or something else")
    if denies(around) or doubts(around) or (doubts(text) and not doubts(option)):
        raise Unreadable("takes the option back")


def _place(option: str) -> re.Pattern[str] | None:
    """How an option occurs in a folded text; None: it never does."""
    cleaned = clean(option)
    name = "" if "\\" in cleaned else fold(cleaned)
    return re.compile(rf"(?<![\w+\-.#<>/]){re.escape(name)}(?![\w+\-#/<>=]|\.\d)") if name else None


def _inside(span: tuple[int, int], other: int, found: dict[int, list[tuple[int, int]]]) -> bool:
    """Is this place part of a longer mention of the other option?"""
    return any(start <= span[0] and span[1] <= end and end - start > span[1] - span[0] for start, end in found[other])
