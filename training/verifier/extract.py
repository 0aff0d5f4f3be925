"""Find the answer in a generated text: the last <answer> block, the last balanced box in it.

Plain string scanning in linear time: a policy that is trained against a verifier finds every slow regular expression.
"""

import re
from dataclasses import dataclass

from metis_home.prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from metis_home.responses import END_TOKENS

from .hedges import clauses, denies

_BOX = re.compile(r"\\(?:boxed|fbox) ?\{")
_LED_IN = re.compile(r"(?:so|thus|therefore|hence),\s+", re.IGNORECASE)
_PUT_FIRST = re.compile(r"(.{1,200}?)\s+is (?:the|my|our) (?:final |correct |right )?answer\W*", re.IGNORECASE)
_PHRASE = re.compile(
    r"(?:\bfinal\s+answer|\banswer|\bsolution|\bresult)\b\W{0,4}(?:(?:is|are|:|=)\s*){1,2}"
    r"|答案\s?(?:是|为|：|:)|故?选(?:项|择)?\s?(?:是|：|:)?(?=\s?[A-Z])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Extraction:
    """The answer's text, or None with the reason why there is none."""

    text: str | None
    reason: str = ""
    boxed: bool = False  # it stood in a \\boxed{}


def extract_answer(text: str) -> Extraction:
    """The answer of a generated text, which may have the think / answer tags, a box, both, or neither.

    1. Reasoning is dropped: everything up to the last `</think>`. Reasoning that was never closed holds no answer,
       unless an answer block follows it.
    2. The last closed `<answer>` block; else what follows an unclosed tag (a stop string may have eaten the end); else
       the whole rest.
    3. In it the last balanced `\\boxed{}` that is not inside another; else what follows the last "the answer is"; else
       all of it.
    """
    body = _without_end_tokens(text)
    position = body.rfind(THINK_CLOSE)
    if position >= 0:
        body = body[position + len(THINK_CLOSE) :]
    block = _last_block(body)
    if block is None and position < 0 and THINK_OPEN in body:
        return Extraction(None, "the reasoning was never closed and no <answer> follows")
    answer = body if block is None else block
    box = last_box(answer)
    if box is not None:
        return Extraction(box.strip(), boxed=True) if box.strip() else Extraction(None, "the box is empty")
    answer = _after_phrase(answer).strip()
    return Extraction(answer) if answer else Extraction(None, "the answer is empty")


def last_box(text: str) -> str | None:
    """The content of the last outermost balanced `\\boxed{...}`, or None. A box that holds only a box is unwrapped."""
    closes = _matching_braces(text)
    content, position = None, 0
    for box in _BOX.finditer(text):
        brace = box.end() - 1
        if box.start() >= position and brace in closes:
            content, position = text[brace + 1 : closes[brace]], closes[brace] + 1
    if content is None:
        return None
    while (inner := _BOX.match(content.strip())) is not None:
        stripped = content.strip()
        if _matching_braces(stripped).get(inner.end() - 1) != len(stripped) - 1:
            break
        content = stripped[inner.end() : -1]
    return content


def _matching_braces(text: str) -> dict[int, int]:
    """Where each balanced opening brace closes; `\\{` and `\\}` are text, not braces."""
    closes, open_braces, position = {}, [], 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            open_braces.append(position)
        elif character == "}" and open_braces:
            closes[open_braces.pop()] = position
        position += 1
    return closes


def _last_block(text: str) -> str | None:
    close = text.rfind(ANSWER_CLOSE)
    if close >= 0:
        # `<answer>a <answer>b</answer></answer>`: the innermost block before the last closing tags.
        start = text.rfind(ANSWER_OPEN, 0, close)
        if start < 0:
            return text[:close]
        first_close = text.find(ANSWER_CLOSE, start)
        return text[start + len(ANSWER_OPEN) : first_close]
    start = text.rfind(ANSWER_OPEN)
    return None if start < 0 else text[start + len(ANSWER_OPEN) :]


def _after_phrase(text: str) -> str:
    """What follows the last "the answer is" on its line; the text itself where nothing does, or the phrase is denied.

    `Thus, x = 4` is `x = 4`, and `4 is the answer` is `4`.
    """
    found = list(_PHRASE.finditer(text))
    if not found:
        text = text.strip()
        text = text[led_in.end() :] if (led_in := _LED_IN.match(text)) else text
        return put_first[1] if (put_first := _PUT_FIRST.fullmatch(text)) else text
    before = text[: found[-1].end()]
    if denies(clauses(before)[-1]):
        return text
    rest = text[found[-1].end() :].strip()
    for mark in ("**", "__"):
        if before.count(mark) % 2:  # "**Answer:** 4"
            rest = rest.removeprefix(mark).strip()
    return rest.split("\n", 1)[0] if rest else text


def _without_end_tokens(text: str) -> str:
    text = text.rstrip()
    while ending := next((token for token in END_TOKENS if text.endswith(token)), ""):
        text = text[: -len(ending)].rstrip()
    return text
