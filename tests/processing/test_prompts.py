"""The thinking switch of the chat template: what it adds, and that it adds nothing else."""

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_home.prompts import (
    MAX_PIXELS,
    MIN_PIXELS,
    SYSTEM_PROMPT,
    add_thinking_switch,
    handles_thinking,
    thinking_prefix,
)
from tests.processing.tiny import CHAT_TEMPLATE, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


def render(template: str, **variables: object) -> str:
    return tiny_tokenizer(template).apply_chat_template(MESSAGES, tokenize=False, **variables)


@pytest.mark.parametrize(("enable", "prefix"), [(None, ""), (True, "<think>"), (False, "<think></think>")])
def test_the_switch_writes_the_format_after_the_generation_prompt(enable: bool | None, prefix: str) -> None:
    before = render(CHAT_TEMPLATE, add_generation_prompt=True)

    after = render(add_thinking_switch(CHAT_TEMPLATE), add_generation_prompt=True, enable_thinking=enable)

    assert after == before + prefix
    assert thinking_prefix(enable) == prefix


@pytest.mark.parametrize("enable", [None, True, False])
def test_without_a_generation_prompt_nothing_is_written(enable: bool | None) -> None:
    rendered = render(add_thinking_switch(CHAT_TEMPLATE), add_generation_prompt=False, enable_thinking=enable)

    assert rendered == render(CHAT_TEMPLATE, add_generation_prompt=False)


def test_a_template_is_changed_once() -> None:
    once = add_thinking_switch(CHAT_TEMPLATE)

    assert add_thinking_switch(once) == once
    assert handles_thinking(once)


def test_a_template_with_its_own_switch_is_left_alone() -> None:
    own = CHAT_TEMPLATE + "{% if enable_thinking %}<think>\n{% endif %}"

    assert add_thinking_switch(own) == own


def test_a_mention_in_a_comment_is_no_switch() -> None:
    assert not handles_thinking("{# enable_thinking is not supported #}" + CHAT_TEMPLATE)


# As transformers and vLLM compile chat templates.
ENVIRONMENT = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)


@given(
    st.sampled_from(["a", "{% if x %}b{% endif %}", "{{ x }}"]),
    st.text("\n\r \t", max_size=4),
    st.sampled_from([{}, {"enable_thinking": None}, {"enable_thinking": False}, {"enable_thinking": True}]),
)
def test_white_space_at_the_end_of_a_template_keeps_its_meaning(end: str, space: str, choice: dict) -> None:
    template = "start\n" + end + space
    before = ENVIRONMENT.from_string(template).render(x=1)

    for generation_prompt in (True, False):
        after = ENVIRONMENT.from_string(add_thinking_switch(template)).render(
            x=1, add_generation_prompt=generation_prompt, **choice
        )
        assert after == before + (thinking_prefix(choice.get("enable_thinking")) if generation_prompt else "")


def test_the_published_prompt_and_sizes_are_verbatim() -> None:
    assert SYSTEM_PROMPT.startswith("Solve the question. The user asks a question, and you solves it.")
    assert r"using the \boxed{} command" in SYSTEM_PROMPT
    assert SYSTEM_PROMPT.endswith("should start with <think> and end with </answer>.")
    assert len(SYSTEM_PROMPT) == 577
    assert (MIN_PIXELS, MAX_PIXELS) == (100352, 12845056)
