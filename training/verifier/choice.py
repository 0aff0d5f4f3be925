"""Multiple choice: the letter, or the text of the option; exactly one, or it does not count."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .normalise import clean, fold
from .verdict import Unreadable
from .words import find_option

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DEFAULT_COUNT = 8  # letters that a sentence may name where the options are unknown: A to H ("I" is a pronoun)
_ONLY = re.compile(r"[(\[<]?\s?([A-Za-z])\s?[)\]>]?\s?[.:)]?")
# "B. 12", "(B) 12", "B: 12", "B) 12"; "B 12" is read as a sentence.
_LABELLED = re.compile(r"(?:[(\[]\s?([A-Za-z])\s?[)\]]|([A-Z])\s?[.:)]|([a-z])\s?[.)])\s*(\S.*)", re.DOTALL)
_LEAD = re.compile(r"^(?:the )?(?:correct |right |best |final )?(?:option|choice|answer)s?(?: is|:)?\s+", re.IGNORECASE)
_MARK = re.compile(r"(?<![\w'\\])[(\[]?([A-Z])[)\]]?(?![\w'])")
_HEDGED = re.compile(r"(?<![\w'])[(\[]?[A-Z][)\]]?,?\s+or\b|\bor\s+[(\[]?[A-Z][)\]]?(?![\w'])")  # "B or 12"
_ARTICLE = re.compile(r"(?<![\w'(\[])A (?=[a-z])")


@dataclass(frozen=True, slots=True)
class Choice:
    """The right option of a question."""

    letter: str  # upper case
    text: str | None  # of the option, where the gold or the options tell
    options: tuple[str, ...] | None

    @property
    def letters(self) -> str:
        """Letters that an answer may name."""
        count = len(self.options) if self.options else max(_DEFAULT_COUNT, LETTERS.index(self.letter) + 1)
        return LETTERS[:count]


def read_gold_choice(text: str, options: Sequence[str] | None = None) -> Choice:
    """`B`, `(B)`, `B. 12`, or with options the text of one.

    Raises:
        Unreadable: no letter, a letter beyond the options, or a text that is not exactly one option.
    """
    known = tuple(_without_label(option, index) for index, option in enumerate(options)) if options else None
    cleaned = clean(text)
    if known is not None and cleaned:
        same = [index for index, option in enumerate(known) if fold(option) == fold(cleaned)]
        if len(same) == 1 and not (len(cleaned) == 1 and cleaned.upper() in LETTERS[: len(known)]):
            return Choice(LETTERS[same[0]], known[same[0]], known)
    letter, rest = _letter_and_rest(cleaned)
    if letter is None:
        raise Unreadable(f"{cleaned[:40]!r} is neither a letter nor exactly one of the options")
    if known is None:
        return Choice(letter, rest or None, None)
    if letter not in LETTERS[: len(known)]:
        raise Unreadable(f"option {letter} of only {len(known)}")
    return Choice(letter, known[LETTERS.index(letter)], known)


def same_choice(gold: Choice, prediction: str, same_text: Callable[[str, str], bool]) -> tuple[bool, str]:
    """Does the prediction choose the gold's option, by letter or by text?

    Args:
        same_text: (option text, prediction) -> do they say the same, such as `0.5` and `1/2`.
    Raises:
        Unreadable: it chooses nothing, or more than one option.
    """
    text = _LEAD.sub("", clean(prediction)).strip()
    letter, rest = _letter_and_rest(text)
    # An option whose text is itself a letter or contains one, like "Vitamin C", is text first.
    if gold.options is not None and (index := _exact_option(text, gold.options)) is not None:
        return _compared(gold, LETTERS[index])
    if letter is not None:
        _refuse_other_letters(letter, rest, gold)
        _refuse_other_text(letter, rest, gold, same_text)
        return _compared(gold, letter)
    if gold.options is not None:
        equal = [index for index, option in enumerate(gold.options) if same_text(option, text)]
        if len(equal) == 1:
            return _compared(gold, LETTERS[equal[0]])
    elif gold.text is not None and same_text(gold.text, text):
        return True, "is the text of the option"
    named = _letters_in(text, gold.letters)
    if _HEDGED.search(text):
        raise Unreadable("names a letter or something else")
    if len(named) == 1:
        return _compared(gold, named.pop())
    if named:
        raise Unreadable(f"names the options {', '.join(sorted(named))}")
    if gold.options is not None:
        return _compared(gold, LETTERS[find_option(text, gold.options)])
    raise Unreadable("names no letter" + ("" if gold.text else "; the texts of the options are unknown"))


def read_letters(text: str) -> frozenset[str]:
    """A set of letters: `A, C`, `AC`, `A and C`, `(A)(C)`.

    Raises:
        Unreadable: anything else stands there.
    """
    cleaned = re.sub(
        r"\b(?:and|options?|choices?|answers?|are|is|the)\b|[,;/&(){}\[\].\\\s]", "", clean(text), flags=re.IGNORECASE
    )
    if not cleaned or not re.fullmatch("[A-Z]+|[a-z]+", cleaned) or len(set(cleaned)) != len(cleaned):
        raise Unreadable("is not a list of different letters")
    return frozenset(cleaned.upper())


def _compared(gold: Choice, letter: str) -> tuple[bool, str]:
    return letter == gold.letter, f"chooses {letter}" + ("" if letter == gold.letter else f", expected {gold.letter}")


def _letter_and_rest(text: str) -> tuple[str | None, str]:
    only = _ONLY.fullmatch(text)
    if only is not None:
        return only[1].upper(), ""
    labelled = _LABELLED.fullmatch(text)
    if labelled is None:
        return None, text
    return (labelled[1] or labelled[2] or labelled[3]).upper(), labelled[4].strip()


def _without_label(option: str, index: int) -> str:
    """`B. 12` -> `12`, where B is the letter of this place; texts that only look labelled stay."""
    cleaned = clean(option)
    letter, rest = _letter_and_rest(cleaned)
    return rest if letter == LETTERS[index % len(LETTERS)] and rest else cleaned


def _exact_option(text: str, options: Sequence[str]) -> int | None:
    if len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        return None
    same = [index for index, option in enumerate(options) if fold(option) == fold(text)]
    return same[0] if len(same) == 1 else None


def _letters_in(text: str, letters: str) -> set[str]:
    return {mark for mark in _MARK.findall(_ARTICLE.sub("", text)) if mark in letters}


def _refuse_other_letters(letter: str, rest: str, gold: Choice) -> None:
    known = gold.options[LETTERS.index(letter)] if gold.options and letter in gold.letters else gold.text
    if known is not None and fold(known) == fold(rest):
        return  # the option's own text may hold letters
    others = _letters_in(rest, gold.letters) - {letter}
    # Without the options, "A. Vitamin C" and "A. or B" look alike: only a label or a joining word tells.
    joined = re.search(r"(?:\b(?:or|and)\b|[,/&;])\s*[(\[]?[A-Z][)\]]?(?![\w'])", " " + rest)
    labelled = re.search(r"(?<![\w'])(?:[(\[][A-Z][)\]]|[A-Z]\s?[.:)](?=\s|$))", rest)
    if others and (joined or labelled):
        raise Unreadable(f"names the options {', '.join(sorted({letter, *others}))}")


def _refuse_other_text(letter: str, rest: str, gold: Choice, same_text: Callable[[str, str], bool]) -> None:
    """`A. 13` where 13 is option B contradicts itself."""
    if not rest or gold.options is None:
        return
    own = gold.options[LETTERS.index(letter)] if letter in gold.letters else ""
    if own and same_text(own, rest):
        return
    for index, option in enumerate(gold.options):
        if LETTERS[index] != letter and same_text(option, rest):
            raise Unreadable(f"names the letter {letter} with the text of option {LETTERS[index]}")
