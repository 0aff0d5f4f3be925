"""`answer` and `route`: one argument sets branch and prefix, and the answer says what happened."""

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from metis_home import Branch
from metis_home.chat import answer, route
from metis_home.errors import BranchError, ProcessorError
from tests.processing.tiny import write_model

MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (56, 56), "red")}, {"type": "text", "text": "Red?"}],
    }
]
TOKENS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("chat"))
    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_forced_branch_gets_its_prefix_and_equals_plain_generate(loaded, thinking: bool) -> None:
    model, processor = loaded
    inputs = processor.apply_chat_template(
        MESSAGES,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        enable_thinking=thinking,
    )
    expected = model.generate(**inputs, thinking=thinking, **TOKENS)[0, inputs["input_ids"].shape[1] :]

    given = answer(model, processor, MESSAGES, thinking=thinking, **TOKENS)

    assert given.text == processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert given.branch is Branch(int(thinking))
    assert given.thinking_probability is None
    assert given.prompt_tokens == inputs["input_ids"].shape[1]
    assert given.completion_tokens == len(expected)


def test_a_thought_that_the_limit_cut_is_reasoning_not_content(loaded) -> None:
    given = answer(*loaded, MESSAGES, thinking=True, **TOKENS)

    assert given.reasoning_content == given.text.strip()
    assert given.content == ""
    assert not given.finished


def test_auto_decides_as_the_router_does_and_writes_no_prefix(loaded) -> None:
    model, processor = loaded
    decision = route(model, processor, MESSAGES)

    given = answer(model, processor, MESSAGES, **TOKENS)

    assert given.branch is Branch(int(decision.branch_ids[0]))
    assert given.thinking_probability == pytest.approx(float(decision.thinking_probability[0]), abs=1e-6)
    forced = answer(model, processor, MESSAGES, thinking=False, **TOKENS)
    extra = len(processor.tokenizer.encode("<think></think>"))
    assert given.prompt_tokens == forced.prompt_tokens - extra


@pytest.mark.parametrize(("threshold", "branch"), [(0.0, Branch.THINKING), (1.0, Branch.NON_THINKING)])
def test_the_threshold_reaches_the_router(loaded, threshold: float, branch: Branch) -> None:
    assert answer(*loaded, MESSAGES, router_threshold=threshold, **TOKENS).branch is branch
    assert int(route(*loaded, MESSAGES, threshold).branch_ids[0]) == branch


def test_an_answer_that_ends_itself_is_finished(loaded) -> None:
    model, processor = loaded
    text = answer(model, processor, MESSAGES, thinking=False, **TOKENS).text
    end = processor.tokenizer.encode(text)[-1]

    given = answer(model, processor, MESSAGES, thinking=False, eos_token_id=end, **TOKENS)

    assert given.finished
    assert given.completion_tokens <= 12


def test_the_papers_length_is_the_default_and_any_limit_of_the_caller_wins(loaded, monkeypatch) -> None:
    model, processor = loaded
    limits = []

    def spy(**kwargs):
        limits.append((kwargs.get("max_new_tokens"), kwargs.get("max_length")))
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", spy)
    for options in ({}, {"max_new_tokens": 3}, {"max_length": 9}, {"generation_config": GenerationConfig()}):
        with pytest.raises(KeyboardInterrupt):
            answer(model, processor, MESSAGES, **options)

    assert limits == [(8192, None), (3, None), (None, 9), (None, None)]


def test_a_conversation_of_several_turns_is_answered(loaded) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]

    given = answer(*loaded, turns, thinking=False, **TOKENS)

    assert given.prompt_tokens > answer(*loaded, MESSAGES, thinking=False, **TOKENS).prompt_tokens


@pytest.mark.parametrize("wrong", ["on", 1, None, [True]])
def test_an_unknown_choice_is_refused(loaded, wrong) -> None:
    with pytest.raises(BranchError, match="thinking is"):
        answer(*loaded, MESSAGES, thinking=wrong)


def test_several_answers_are_refused(loaded) -> None:
    with pytest.raises(ProcessorError, match="num_return_sequences is 2"):
        answer(*loaded, MESSAGES, num_return_sequences=2)


def test_a_pipeline_answers_with_the_parts_of_a_message(loaded) -> None:
    from transformers import pipeline

    model, processor = loaded
    pipe = pipeline("image-text-to-text", model=model, processor=processor)

    for thinking in (True, False):
        [result] = pipe(text=MESSAGES, generate_kwargs={"thinking": thinking, **TOKENS})
        message = result["generated_text"][-1]
        assert message["role"] == "assistant"
        assert set(message) == {"role", "reasoning_content", "content"}
