"""The two response formats that are trained, and what breaks them.

    thinking       <think>reasoning</think><answer>answer</answer>
    non-thinking   <think></think><answer>answer</answer>

Source: Metis-HOME (arXiv 2510.20519), its two response formats.
"""

import re
import unicodedata
from typing import NamedTuple

from metis_home.branch import Branch
from metis_home.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, thinking_prefix

TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
# Letters and symbols without ink: fillers of Hangul, the empty Braille cell.
_INKLESS = "\u115f\u1160\u3164\uffa0\u2800"
MODES = {"thinking": Branch.THINKING, "non_thinking": Branch.NON_THINKING}
_FORMAT = re.compile(
    rf"{THINK_OPEN}(?P<reasoning>.*?){THINK_CLOSE}\s*{ANSWER_OPEN}(?P<answer>.*?){ANSWER_CLOSE}\s*", re.DOTALL
)


class ResponseParts(NamedTuple):
    """What stands between the tags, untouched."""

    reasoning: str
    answer: str


def mode_name(mode: Branch) -> str:
    """The word of data files: `thinking` or `non_thinking`."""
    return "thinking" if mode is Branch.THINKING else "non_thinking"


def build_response(reasoning: str, answer: str, mode: Branch) -> str:
    """Put reasoning and answer between the tags of `mode`; nothing is stripped. Non-thinking drops the reasoning."""
    thought = reasoning if mode is Branch.THINKING else ""
    return f"{THINK_OPEN}{thought}{THINK_CLOSE}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def split_response(response: str) -> ResponseParts | None:
    """Take apart a response that is exactly in one of the formats; None for any other text."""
    if any(response.count(tag) != 1 for tag in TAGS):
        return None
    match = _FORMAT.fullmatch(response)
    return None if match is None else ResponseParts(match["reasoning"], match["answer"])


def is_blank(text: str) -> bool:
    """Nothing can be seen in it: white space, control and zero-width characters alone."""
    return not any(unicodedata.category(letter)[0] in "LNPS" and letter not in _INKLESS for letter in text)


def format_problem(response: str, mode: Branch | None) -> str | None:
    """Say why `response` is not in the format of `mode`; None if it is.

    The format is strict: exactly one of each tag, nothing before `<think>` or after `</answer>` but white space, white
    space at most between the two parts, an answer that is not blank, and a blank `<think>` in non-thinking rows only.
    With `mode=None` both formats are right.
    """
    for tag in TAGS:
        if response.count(tag) != 1:
            return f"{response.count(tag)} times {tag}, expected once"
    parts = split_response(response)
    if parts is None:
        return f"expected <think>...</think><answer>...</answer> and nothing around it, found {_shortened(response)!r}"
    if is_blank(parts.answer):
        return "nothing between <answer> and </answer>"
    if mode is Branch.THINKING and is_blank(parts.reasoning):
        return "mode is thinking, and there is nothing between <think> and </think>"
    if mode is Branch.NON_THINKING and parts.reasoning:
        return f"mode is non_thinking, and <think> holds {_shortened(parts.reasoning)!r}"
    return None


def split_prefix(response: str, mode: Branch | None) -> tuple[str, str]:
    """Cut a response after the prefix that forces its branch: `<think>` or `<think></think>`, (prefix, rest).

    The two are tokenized apart, so that a model whose prompt ends with the prefix goes on exactly as it was trained.
    A response that does not begin with a prefix is returned as ("", response).
    """
    branches = list(Branch) if mode is None else [mode]  # the longer prefix first
    for branch in branches:
        prefix = thinking_prefix(branch is Branch.THINKING)
        if response.startswith(prefix):
            return prefix, response[len(prefix) :]
    return "", response


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
