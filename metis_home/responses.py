"""Take an answer apart: reasoning between <think> tags, content between <answer> tags.

Generated text is rarely tidy. The template may have written the opening tag, the token limit may have cut the answer
anywhere, and a model that explains its own format writes tags inside its text. The rules here never raise and never
drop text: whatever stands outside both pairs of tags is content. Standard library only.
"""

import re
from itertools import dropwhile
from typing import NamedTuple, TypedDict

from .prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

END_TOKENS = ("<|im_end|>", "<|endoftext|>")

_THINK_TAG = re.compile(r"</?think>")
_ANSWER_TAG = re.compile(r"</?answer>")
_ANSWER_FOLLOWS = re.compile(r"\s*<answer>")


class ParsedResponse(TypedDict):
    """The two parts of an answer, stripped; an absent part is the empty string."""

    reasoning_content: str
    content: str


class _Span(NamedTuple):
    start: int  # of the reasoning, after its opening tag
    end: int  # of the reasoning, before its closing tag
    resume: int  # after the closing tag
    preamble: str  # what stood before the opening tag


def parse_response(text: str, *, prefix: str = "", end_tokens: tuple[str, ...] = END_TOKENS) -> ParsedResponse:
    """Split a generated answer into reasoning and content.

    | text | reasoning | content |
    |---|---|---|
    | `<think>r</think><answer>c</answer>` | r | c |
    | `<think></think><answer>c</answer>` | | c |
    | `r</think><answer>c</answer>` (the template wrote `<think>`) | r | c |
    | `<think>r` (cut) | r | |
    | `<think>r</think><answer>c` (cut) | r | c |
    | `<think>r</think>c`, `c` | r, nothing | c |

    Of several closing tags the one counts that leaves no tag open and is followed by `<answer>`; then the first that
    is followed by `<answer>`; then the first that leaves no tag open; then the last.

    Args:
        text: generated text, with or without special tokens.
        prefix: what the prompt already holds of this answer, such as `<think>`; a longer prompt is cut to that.
        end_tokens: special tokens to remove from the end.
    """
    body = _open_thought(prefix) + _without_end_tokens(text, end_tokens)
    span = _find_reasoning(body)
    if span is None:
        return {"reasoning_content": "", "content": _unwrap(body)}
    content = [span.preamble.strip(), _unwrap(body[span.resume :])]
    return {
        "reasoning_content": body[span.start : span.end].strip(),
        "content": "\n".join(part for part in content if part),
    }


def response_template(end_tokens: tuple[str, ...] = END_TOKENS) -> dict[str, object]:
    """The same split in the declarative form that transformers' own `tokenizer.parse_response` reads.

    Pipelines and `transformers serve` use it, with the prompt as prefix. Content is the field without an opening tag:
    it takes all text outside <think>, and <answer> tags only close it, so plain text is not lost. Tags inside
    reasoning are beyond this form; `parse_response` handles those.
    """
    ends = [re.escape(token) for token in dict.fromkeys(end_tokens) if token]
    thought_ends = "|".join(["</think>", *ends])
    answer_ends = "|".join([r"<answer>\s*", r"\s*</answer>", *(rf"\s*{end}\s*" for end in ends)])
    # `repeats` with `join`: the field may be left and entered again (text before <think>, after </answer>).
    keep_all = {"repeats": True, "join": "", "content": "text", "content_args": {"strip": False}}
    return {
        "defaults": {"role": "assistant", "reasoning_content": "", "content": ""},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {
                "open_pattern": r"\s*<think>\s*",
                "close_pattern": rf"\s*(?:{thought_ends})\s*",
                **keep_all,
            },
            "content": {"close_pattern": answer_ends, **keep_all},
        },
    }


def _open_thought(prefix: str) -> str:
    """The part of a prompt that belongs to the answer: an opened thought at its very end, or nothing."""
    for ending in (THINK_OPEN + THINK_CLOSE, THINK_OPEN):
        if prefix.rstrip().endswith(ending):
            return ending
    return ""


def _without_end_tokens(text: str, end_tokens: tuple[str, ...]) -> str:
    """Remove end-of-text tokens (a padded batch has many) and white space from the end."""
    text = text.rstrip()
    end = len(text)
    while ending := next((token for token in end_tokens if token and text.endswith(token, 0, end)), ""):
        end -= len(ending)
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def _find_reasoning(text: str) -> _Span | None:
    """Where the reasoning is, or None for an answer without any."""
    first_open, first_close = text.find(THINK_OPEN), text.find(THINK_CLOSE)
    starts_open = first_open >= 0 and not text[:first_open].strip()
    if first_close < 0:
        if not starts_open:
            return None  # plain text, which may mention the tag
        return _unclosed(text, first_open + len(THINK_OPEN))
    if text.lstrip().startswith(ANSWER_OPEN):
        return None  # an answer that talks about the tags
    injected = first_open < 0 or first_close < first_open or text.count(THINK_CLOSE) > text.count(THINK_OPEN)
    if starts_open or not injected:
        start, preamble = first_open + len(THINK_OPEN), text[:first_open]
    else:
        start, preamble = 0, ""
    end = _closing_tag(text, start)
    return _Span(start, end, end + len(THINK_CLOSE), preamble)


def _unclosed(text: str, start: int) -> _Span:
    """Reasoning that never ends was cut, unless a whole answer ends the text: then only the tag was forgotten."""
    answer = text.rfind(ANSWER_OPEN, start)
    end = answer if answer >= 0 and text.endswith(ANSWER_CLOSE) else len(text)
    return _Span(start, end, end, "")


def _closing_tag(text: str, start: int) -> int:
    """Choose the `</think>` that ends the reasoning; `parse_response` states the order of preference."""
    depth = 1
    balanced = before_answer = last = -1
    for tag in _THINK_TAG.finditer(text, start):
        if tag.group() == THINK_OPEN:
            depth += 1
            continue
        depth -= 1
        last = tag.start()
        answer_follows = _ANSWER_FOLLOWS.match(text, tag.end()) is not None
        if depth <= 0 and answer_follows:
            return last
        if answer_follows and before_answer < 0:
            before_answer = last
        if depth == 0 and balanced < 0:
            balanced = last
    return next(position for position in (before_answer, balanced, last) if position >= 0)


def _unwrap(text: str) -> str:
    """Remove the tags of each outermost <answer> ... </answer>, finished or not, and keep all text in order."""
    parts, position = [], 0
    for tag in _outer_answer_tags(text):
        parts.append(text[position : tag.start()].strip())
        position = tag.end()
    parts.append(text[position:].strip())
    return "\n".join(part for part in parts if part)


def _outer_answer_tags(text: str) -> list[re.Match[str]]:
    """The tags that delimit answers, without those inside one.

    Where more tags close than open, an answer mentions its closing tag: then the last one ends it.
    """
    tags = list(dropwhile(lambda tag: tag.group() == ANSWER_CLOSE, _ANSWER_TAG.finditer(text)))
    closing = [tag for tag in tags if tag.group() == ANSWER_CLOSE]
    if 2 * len(closing) > len(tags):
        return [tags[0], closing[-1]]
    outer: list[re.Match[str]] = []
    depth, last_closing = 0, None
    for tag in tags:
        if tag.group() == ANSWER_OPEN:
            if depth == 0:
                outer.append(tag)
                last_closing = None
            depth += 1
        elif depth > 0:
            depth -= 1
            last_closing = tag
            if depth == 0:
                outer.append(tag)
    if depth > 0 and last_closing is not None:  # an answer that mentions its opening tag
        outer.append(last_closing)
    return outer
