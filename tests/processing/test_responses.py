"""Answers of every shape are taken apart without an exception and without losing a word."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metis_home.responses import parse_response, response_template
from tests.processing.tiny import tiny_tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PROMPT = "<|im_start|>user\nSay <think> or <answer>.<|im_end|>\n<|im_start|>assistant\n"

FORMS = {
    "thinking": ("<think>r</think><answer>c</answer>", "r", "c"),
    "thinking with white space": ("\n<think> r </think>\n\n<answer> c </answer>\n", "r", "c"),
    "non-thinking": ("<think></think><answer>c</answer>", "", "c"),
    "non-thinking with white space": ("<think>\n\n</think>\n\n<answer>c</answer>", "", "c"),
    "opening tag in the prompt": ("r</think><answer>c</answer>", "r", "c"),
    "cut in the reasoning": ("<think>r and so", "r and so", ""),
    "cut in the closing tag": ("<think>r</thi", "r</thi", ""),
    "cut between": ("<think>r</think>", "r", ""),
    "cut in the answer": ("<think>r</think><answer>c is", "r", "c is"),
    "no answer tags": ("<think>r</think>c", "r", "c"),
    "no tags": ("c", "", "c"),
    "answer tags only": ("<answer>c</answer>", "", "c"),
    "answer tags only, cut": ("<answer>c", "", "c"),
    "closing think tag forgotten": ("<think>r<answer>c</answer>", "r", "c"),
    "end token": ("<think>r</think><answer>c</answer><|im_end|>", "r", "c"),
    "end token and padding": ("<think>r</think><answer>c</answer><|im_end|>\n<|endoftext|><|endoftext|>", "r", "c"),
    "end token after a cut thought": ("<think>r<|endoftext|>", "r", ""),
    "text around the answer": ("<think>r</think>So:\n<answer>c</answer>\nDone.", "r", "So:\nc\nDone."),
    "text before the thought": ("Well. <think>r</think><answer>c</answer>", "r", "Well.\nc"),
    "nested thought": ("<think>r<think>s</think>t</think><answer>c</answer>", "r<think>s</think>t", "c"),
    "format quoted in the thought": (
        "<think>As <think>x</think><answer>y</answer>. So r</think><answer>c</answer>",
        "As <think>x</think><answer>y</answer>. So r",
        "c",
    ),
    "opening tag mentioned": ("<think>the tag <think> opens</think><answer>c</answer>", "the tag <think> opens", "c"),
    "closing tag mentioned": ("<think>the </think> ends it</think><answer>c</answer>", "the </think> ends it", "c"),
    "opening tag mentioned, closing tag in the answer": (
        "<think>a <think> tag</think><answer>its end is </think></answer>",
        "a <think> tag",
        "its end is </think>",
    ),
    "closing tag mentioned after the thought": ("<think>r</think>write </think> last", "r", "write </think> last"),
    "answer drafted in the thought": (
        "<think>maybe <answer>d</answer>?</think><answer>c</answer>",
        "maybe <answer>d</answer>?",
        "c",
    ),
    "tags mentioned in the answer": (
        "<think>r</think><answer>use <think> and </think></answer>",
        "r",
        "use <think> and </think>",
    ),
    "answer tag mentioned in the answer": ("<think></think><answer>a </answer> tag</answer>", "", "a </answer> tag"),
    "answer repeated": ("<think>r</think><answer>c</answer><answer>d</answer>", "r", "c\nd"),
    "answer nested": ("<think>r</think><answer>a<answer>b</answer>c</answer>", "r", "a<answer>b</answer>c"),
    "answer about the tags, without thought": ("<answer>write </think> last</answer>", "", "write </think> last"),
    "tag mentioned in plain text": ("The tag <think> opens a thought.", "", "The tag <think> opens a thought."),
    "nothing": ("", "", ""),
    "only an end token": ("<|im_end|>", "", ""),
}


@pytest.mark.parametrize(("text", "reasoning", "content"), FORMS.values(), ids=FORMS.keys())
def test_every_form_of_answer_is_split(text: str, reasoning: str, content: str) -> None:
    assert parse_response(text) == {"reasoning_content": reasoning, "content": content}


@pytest.mark.parametrize(
    ("prefix", "text", "reasoning", "content"),
    [
        (PROMPT + "<think>", "cut before any tag", "cut before any tag", ""),
        (PROMPT + "<think>", "r</think><answer>c</answer>", "r", "c"),
        (PROMPT + "<think>\n", "r</think>c", "r", "c"),
        (PROMPT + "<think></think>", "<answer>c</answer>", "", "c"),
        (PROMPT + "<think></think>", "plain", "", "plain"),
        (PROMPT, "plain", "", "plain"),
    ],
)
def test_a_prefix_written_by_the_template_belongs_to_the_answer(
    prefix: str, text: str, reasoning: str, content: str
) -> None:
    assert parse_response(text, prefix=prefix) == {"reasoning_content": reasoning, "content": content}


def words(text: str) -> list[str]:
    return sorted(re.findall(r"w\d+w", text))


# Words that are all different, between tags in any order: what a confused model may write.
scrambles = st.lists(st.sampled_from([*TAGS, "word", " ", "\n", "<|im_end|>"]), max_size=24).map(
    lambda pieces: "".join(f"w{i}w" if piece == "word" else piece for i, piece in enumerate(pieces))
)


@given(scrambles)
@example("w0w</think>w1w<think>w2w</answer>w3w<answer>w4w")
def test_no_word_is_lost_or_doubled(text: str) -> None:
    parsed = parse_response(text)

    assert words(parsed["reasoning_content"] + "|" + parsed["content"]) == words(text)


@given(scrambles, st.sampled_from(["", "<think>", "<think></think>"]))
def test_nothing_but_tags_white_space_and_final_end_tokens_is_removed(text: str, prefix: str) -> None:
    def bare(text: str) -> str:
        return "".join(sorted(re.sub(r"</?think>|</?answer>|<\|im_end\|>|\s", "", text)))

    parsed = parse_response(text, prefix=prefix)

    assert bare(parsed["reasoning_content"] + parsed["content"]) == bare(text)


@given(st.text())
def test_any_text_is_accepted(text: str) -> None:
    parsed = parse_response(text)

    assert set(parsed) == {"reasoning_content", "content"}


plain = st.text().map(str.strip).filter(lambda text: not re.search(r"</?(think|answer)>", text))
plain = plain.filter(lambda text: not text.endswith(("<|im_end|>", "<|endoftext|>")))


@given(plain, plain)
def test_the_two_formats_of_the_papers_round_trip(reasoning: str, content: str) -> None:
    text = f"<think>{reasoning}</think><answer>{content}</answer>"

    assert parse_response(text) == {"reasoning_content": reasoning, "content": content}
    assert parse_response(text.removeprefix("<think>"), prefix=PROMPT + "<think>") == parse_response(text)


# ---- the declarative form that transformers reads -----------------------------------------------------------------

DECLARATIVE_EXCEPTIONS = {
    # Tags inside the text are beyond the declarative form, and a missing opening tag needs the prompt.
    "opening tag in the prompt",
    "closing think tag forgotten",
    "nested thought",
    "format quoted in the thought",
    "opening tag mentioned",
    "opening tag mentioned, closing tag in the answer",
    "closing tag mentioned",
    "tags mentioned in the answer",
    "answer tag mentioned in the answer",
    "answer repeated",
    "answer nested",
    "text before the thought",
    "tag mentioned in plain text",
}


@pytest.mark.parametrize("form", sorted(FORMS.keys() - DECLARATIVE_EXCEPTIONS))
def test_transformers_own_parser_agrees_where_tags_are_regular(form: str) -> None:
    text, reasoning, content = FORMS[form]
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = response_template()

    message = tokenizer.parse_response(text, prefix=PROMPT)

    assert {key: value.strip() for key, value in message.items()} == {
        "role": "assistant",
        "reasoning_content": reasoning,
        "content": content,
    }


def test_transformers_own_parser_sees_a_thought_that_the_prompt_opened() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = response_template()

    message = tokenizer.parse_response("r</think><answer>c</answer><|im_end|>", prefix=PROMPT + "<think>")

    assert message == {"role": "assistant", "reasoning_content": "r", "content": "c"}


@given(scrambles)
def test_transformers_own_parser_loses_no_word_either(text: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = response_template()

    message = tokenizer.parse_response(text, prefix=PROMPT)

    assert words(message["reasoning_content"] + "|" + message["content"]) == words(text)
