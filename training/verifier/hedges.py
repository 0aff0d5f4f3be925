"""Words that take an answer back: denials, doubts, second thoughts. One list for all kinds of answers.

A reward for `B is wrong` teaches a policy to write it, so a text with such words is no answer, even where a reader
could guess what is meant.
"""

import re

_DENIAL = re.compile(
    r"\b(?:not|never|either|neither|nor|cannot|without|no(?=\s\W?[a-z]\b)|except|exclud\w+"
    r"|(?:anything|everything|all|nothing) but|other than|rather than|instead of|wrong|incorrect|false|mistaken?"
    r"|eliminat\w+|reject\w*|rul(?:e|es|ed|ing) out|impossible|unlikely)\b"
    r"|n't\b|[不没错]|\\not(?![a-z])|\\neq?(?![a-z])|≠",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:maybe|perhaps|possibly|might|could be|unsure|uncertain|undecided|not sure|don't know|guess(?:ing|es)?"
    r"|(?<!no )doubt\w*|wait|never ?mind|ignore|forget|no idea|impossible to (?:tell|say))\b|\?",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[.,;:!?](?=\s|$)|\n|\b(?:so|therefore|thus|hence|because|since)\b", re.IGNORECASE)
_REASON = re.compile(r"(?<=\S),?\s+(?:because|since)\b", re.IGNORECASE)


def denies(text: str) -> bool:
    """Does it say that something is not so: `not B`, `anything but B`, `B is wrong`, `x ≠ 4`?"""
    return _DENIAL.search(text) is not None


def doubts(text: str) -> bool:
    """Does it leave open what is so: `maybe B`, `4 wait`, `B?`"""
    return _DOUBT.search(text) is not None


def clauses(text: str) -> list[str]:
    """The parts of a sentence in which a denial holds: `It is not red, so it is B` denies nothing of B."""
    return _CLAUSE.split(text)


def without_reason(text: str) -> str:
    """`B because A is wrong` -> `B`: the reason may name and deny what it likes."""
    return _REASON.split(text, maxsplit=1)[0]
