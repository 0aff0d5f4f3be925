"""Multiple choice: the letter, or the text of the option; exactly one, or it does not count."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .hedges import clauses, denies, doubts, without_reason
from .normalise import clean, fold
from .verdict import Unreadable
from .words import find_option, named_options, refuse_hedges

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DEFAULT_COUNT = 8  # letters that a sentence may name where the options are unknown: A to H ("I" is a pronoun)
_ONLY = re.compile(r"[(\[<]?\s?([A-Za-z])\s?[)\]>]?\s?[.:)]?")
# "B. 12", "(B) 12", "B: 12", "B) 12"; "B 12" is read as a sentence.
_LABELLED = re.compile(r"(?:[(\[]\s?([A-Za-z])\s?[)\]]|([A-Z])\s?[.:)]|([a-z])\s?[.)])\s*(\S.*)", re.DOTALL)
_LEAD = re.compile(r"^(?:the )?(?:correct |right |best |final )?(?:option|choice|answer)s?(?: is|:)?\s+", re.IGNORECASE)
# Not the C of `20 °C`, `20 C`, `C++`; the one of `5 (C)`.
_MARK = re.compile(r"(?<![\w'\\°])(?:[(\[]([A-Z])[)\]]|(?<!\d )([A-Z]))(?![\w'+#])")
_HEDGED = re.compile(r"(?<![\w'])[(\[]?[A-Z][)\]]?,?\s+or\b|\bor\s+[(\[]?[A-Z][)\]]?(?![\w'])")  # "B or 12"
_ARTICLE = re.compile(r"(?<![\w'(\[])A (?=[a-z])")
_VERB = re.compile(r"(?:is|was|are|isn't|wasn't|can|cannot|can't|may|might|seems|looks)\b", re.IGNORECASE)
_QUANTIFIED = re.compile(r"(?:both|all|none|neither|only)\b", re.IGNORECASE)  # "Both B and C" is the text of an option
_LABEL_INSIDE = re.compile(r"(?<![\w'])(?:[(\[]([A-Za-z])[)\]]|([A-Z])\s?[.:)](?=\s|$)|([a-z])\)(?=\s|$))")
_JOINED = re.compile(r"(?:\b(?:or|and)\b|[,/&;])\s*[(\[]?[A-Z][)\]]?(?![\w'])")


@dataclass(frozen=True, slots=True)
class Choice:
    """The right option of a question."""

    index: int
    text: str | None  # of the option, where the gold or the options tell
    options: tuple[str, ...] | None

    @property
    def letters(self) -> str:
        """Letters that an answer may name; options behind the 26th have none."""
        return LETTERS[: len(self.options) if self.options else max(_DEFAULT_COUNT, self.index + 1)]


def read_gold_choice(text: str, options: Sequence[str] | None = None) -> Choice:
    """`B`, `(B)`, `B. 12`, or with options the text of one.

    Raises:
        Unreadable: no letter, a letter beyond the options, or a text that is not exactly one option.
    """
    known = tuple(_without_label(option, index) for index, option in enumerate(options)) if options else None
    cleaned = clean(text)
    if known is not None and cleaned and (index := _exact_option(cleaned, known)) is not None:
        return Choice(index, known[index], known)
    letter, rest = _letter_and_rest(cleaned)
    if letter is None:
        raise Unreadable(f"{cleaned[:40]!r} is neither a letter nor exactly one of the options")
    index = LETTERS.index(letter)
    if known is None:
        return Choice(index, rest or None, None)
    if index >= len(known):
        raise Unreadable(f"option {letter} of only {len(known)}")
    return Choice(index, known[index], known)


def same_choice(gold: Choice, prediction: str, same_text: Callable[[str, str], bool]) -> tuple[bool, str]:
    """Does the prediction choose the gold's option, by letter or by text?

    Args:
        same_text: (option text, prediction) -> do they say the same, such as `0.5` and `1/2`.
    Raises:
        Unreadable: it chooses nothing, or more than one option, or takes back what it chooses.
    """
    text = _LEAD.sub("", clean(prediction)).strip()
    # An option whose text is itself a letter or contains one, like "Vitamin C", is text first.
    if gold.options is not None and (index := _exact_option(text, gold.options)) is not None:
        return _compared(gold, index)
    letter, rest = _letter_and_rest(text)
    if letter is not None:
        index = LETTERS.index(letter)
        if not _says_own_text(index, rest, gold, same_text):
            _refuse_other_letters(letter, rest, gold)
            _refuse_other_text(index, rest, gold, same_text)
        return _compared(gold, index)
    if gold.options is not None:
        equal = [index for index, option in enumerate(gold.options) if same_text(option, text)]
        if len(equal) == 1:
            return _compared(gold, equal[0])
    elif gold.text is not None and same_text(gold.text, text):
        return True, "is the text of the option"
    text = without_reason(text)
    named = _letters_in(text, gold.letters)
    if _HEDGED.search(text):
        raise Unreadable("names a letter or something else")
    if len(named) == 1:
        letter = named.pop()
        if doubts(text) or any(denies(part) for part in clauses(text) if letter in _letters_in(part, letter)):
            raise Unreadable(f"takes the letter {letter} back")
        return _compared(gold, LETTERS.index(letter))
    if named:
        raise Unreadable(f"names the options {', '.join(sorted(named))}")
    if gold.options is not None:
        return _compared(gold, find_option(text, gold.options))
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


def _compared(gold: Choice, index: int) -> tuple[bool, str]:
    same = index == gold.index
    return same, f"chooses {_title(index)}" + ("" if same else f", expected {_title(gold.index)}")


def _title(index: int) -> str:
    return LETTERS[index] if index < len(LETTERS) else f"option {index + 1}"


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
    """The one option with this text, letter by letter or else word by word. A letter of the question is no text."""
    if len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        return None
    found = [index for index, option in enumerate(options) if option == text]
    if not found and _letter_and_rest(text)[0] is None:  # to `fold` the A of "A. cat" is an article
        found = [index for index, option in enumerate(options) if fold(option) == fold(text)]
    return found[0] if len(found) == 1 else None


def _letters_in(text: str, letters: str) -> set[str]:
    marks = (bracketed or bare for bracketed, bare in _MARK.findall(_ARTICLE.sub("", text)))
    return {mark for mark in marks if mark in letters}


def _says_own_text(index: int, rest: str, gold: Choice, same_text: Callable[[str, str], bool]) -> bool:
    if not rest:
        return True
    own = gold.options[index] if gold.options and index < len(gold.options) else None
    own = gold.text if gold.options is None and index == gold.index else own
    return own is not None and same_text(own, rest)


def _refuse_other_letters(letter: str, rest: str, gold: Choice) -> None:
    """`B. (c) (d)`, `A: B`, `B. 12 or C`; the texts of options, `A. Vitamin C` and `D. Both B and C`, name others too."""
    words = re.findall(r"\w+", rest)
    only_letters = all(len(word) == 1 or word.lower() in ("and", "or") for word in words)
    if only_letters:
        others = {word.upper() for word in words if len(word) == 1 and word.isalpha()}
    else:
        others = {"".join(found).upper() for found in _LABEL_INSIDE.findall(rest)}
        if _JOINED.search(" " + rest) and not _QUANTIFIED.match(rest):
            others |= _letters_in(rest, gold.letters)
    others = {other for other in others if other in gold.letters and other != letter}
    if others:
        raise Unreadable(f"names the options {', '.join(sorted({letter, *others}))}")
    if (_VERB.match(rest) or not words) and (denies(rest) or doubts(rest)):
        raise Unreadable(f"takes the letter {letter} back")


def _refuse_other_text(index: int, rest: str, gold: Choice, same_text: Callable[[str, str], bool]) -> None:
    """`A. 13` where 13 is option B contradicts itself; so does `A. It is 13`, `A. not 12`."""
    if gold.options is None:
        return
    rest = without_reason(rest)
    for other, option in enumerate(gold.options):
        if other != index and same_text(option, rest):
            raise Unreadable(f"names {_title(index)} with the text of {_title(other)}")
    others = named_options(rest, gold.options) - {index}
    if others:
        raise Unreadable(f"names {_title(index)} with the text of {_title(others.pop())}")
    refuse_hedges(rest, gold.options[index] if index < len(gold.options) else "")
