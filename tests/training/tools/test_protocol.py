"""Calls as models write them, observations as templates write them."""

from collections.abc import Mapping

import pytest
from PIL import Image

from metis_home.errors import RecipeError, SandboxError
from metis_home.training.tools.limits import SandboxLimits, ToolLimits
from metis_home.training.tools.protocol import (
    ToolContext,
    ToolResult,
    check_arguments,
    cut_middle,
    describe,
    neutralise,
    observation_blocks,
    parse_calls,
    system_prompt_with_tools,
    tools_by_name,
)
from tests.processing.tiny import tiny_tokenizer

GOOD = '<tool_call>\n{"name": "python", "arguments": {"code": "print(1)"}}\n</tool_call>'


class Lookup:
    """A tool with one required and one optional argument."""

    name = "lookup"
    description = describe(
        "lookup", "Find «it».", {"word": {"type": "string"}, "count": {"type": "integer", "default": 3}}
    )

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        return ToolResult(text="found")


def test_a_call_is_read_with_what_stands_around_it() -> None:
    (call,) = parse_calls(f"<think>I compute.</think>\n{GOOD}\n")

    assert (call.name, call.arguments, call.problem) == ("python", {"code": "print(1)"}, None)


def test_several_calls_come_in_order() -> None:
    text = GOOD + '<tool_call>{"name": "b", "arguments": {}}</tool_call> <tool_call>{"name": "c"}</tool_call>'

    assert [call.name for call in parse_calls(text)] == ["python", "b", "c"]


def test_a_call_whose_closing_tag_the_engine_left_out_is_read() -> None:
    (call,) = parse_calls(GOOD.removesuffix("</tool_call>"))

    assert call.problem is None


def test_line_ends_inside_strings_are_read() -> None:
    (call,) = parse_calls('<tool_call>{"name": "python", "arguments": {"code": "a = 1\nprint(a)"}}</tool_call>')

    assert call.arguments == {"code": "a = 1\nprint(a)"}


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("{oops", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", 'expected {"name"'),
        ('{"name": 3, "arguments": {}}', 'expected {"name"'),
        ('{"arguments": {}}', 'expected {"name"'),
        ('{"name": "python", "arguments": "print(1)"}', "arguments are of type string"),
        ('{"name": "python", "arguments": null}', "arguments are of type null"),
        ("[" * 100_000, "nested too deeply|characters"),
        ("[" * 30_000, "nested too deeply|not valid JSON"),
        ('{"name": "python", "arguments": {"code": "' + "x" * 70_000 + '"}}', "at most 65536"),
        ('{"name": "a", "arguments": {}} {"name": "b", "arguments": {}}', "Extra data"),
        ("9" * 5000, "."),
    ],
)
def test_a_call_that_cannot_be_read_says_why(block: str, reason: str) -> None:
    (call,) = parse_calls(f"<tool_call>{block}</tool_call>")

    assert call.problem is not None
    assert any(part in call.problem for part in reason.split("|"))


def test_unbalanced_tags_are_problems_and_later_calls_are_still_read() -> None:
    calls = parse_calls(f"</tool_call><tool_call>lost {GOOD} <tool_call>cut")

    assert [call.problem is None for call in calls] == [False, False, True, False]


def test_text_without_calls_has_none() -> None:
    assert parse_calls("<think>no tool needed</think><answer>4</answer>") == []


def test_calls_that_ask_the_same_have_the_same_key() -> None:
    one, two, other = parse_calls(
        '<tool_call>{"name": "a", "arguments": {"x": 1, "y": [2]}}</tool_call>'
        '<tool_call>{"arguments": {"y":[2],"x":1}, "name":"a"}</tool_call>'
        '<tool_call>{"arguments": {"y":[3],"x":1}, "name":"a"}</tool_call>'
    )

    assert one.key == two.key != other.key


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"word": "x"}, None),
        ({"word": "x", "count": 2}, None),
        ({}, "expected the arguments word, count; found none"),
        ({"word": "x", "extra": 1}, "found word, extra"),
        ({"word": 5}, "word is of type integer; expected string"),
        ({"word": "x", "count": True}, "count is of type boolean"),
        ({"word": None}, "word is of type null"),
    ],
)
def test_arguments_are_held_to_the_schema(arguments: dict, problem: str | None) -> None:
    found = check_arguments(Lookup(), arguments)

    assert found is None if problem is None else problem in str(found)


def test_the_system_turn_is_what_qwens_template_writes_for_tools() -> None:
    """Oracle: the tools part of Qwen2.5's published template, rendered by transformers."""
    template = (
        "{{- messages[0]['content'] }}"
        '{{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n'
        'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}'
        '{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}'
        '{{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
        '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": '
        '<args-json-object>}\\n</tool_call>" }}'
    )

    rendered = tiny_tokenizer(template).apply_chat_template(
        [{"role": "system", "content": "Be exact."}], tools=[Lookup.description], tokenize=False
    )

    assert system_prompt_with_tools("Be exact.", [Lookup()]) == rendered


def test_without_tools_the_system_prompt_stays() -> None:
    assert system_prompt_with_tools("Be exact.", []) == "Be exact."


def test_observations_are_written_as_templates_write_tool_messages() -> None:
    blocks = observation_blocks([ToolResult(text="1"), ToolResult(text="two")], ToolLimits())

    assert blocks == [
        {
            "type": "text",
            "text": "<tool_response>\n1\n</tool_response>\n<tool_response>\ntwo\n</tool_response>",
        }
    ]


def test_images_stand_inside_their_response_and_are_limited_over_all_results() -> None:
    picture = Image.new("RGB", (30, 30))
    results = [ToolResult(text="a", images=(picture, picture)), ToolResult(text="", images=(picture, picture))]

    blocks = observation_blocks(results, ToolLimits(images=3))

    assert [block["type"] for block in blocks] == ["text", "image", "image", "text", "image", "text"]
    assert blocks[0]["text"] == "<tool_response>\na\n"
    assert "[1 of 2 images left out]" in str(blocks[3]["text"])
    assert blocks[-1]["text"] == "\n</tool_response>"


def test_large_images_are_scaled_down_and_keep_their_shape() -> None:
    wide = ToolResult(text="", images=(Image.new("L", (4000, 1000)),))

    (image,) = [b["image"] for b in observation_blocks([wide], ToolLimits(image_pixels=10_000)) if "image" in b]

    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.width * image.height <= 10_000
    assert image.width / image.height == pytest.approx(4, rel=0.05)


def test_long_text_keeps_its_beginning_and_its_end() -> None:
    text = "a" * 500 + "MIDDLE" + "z" * 500

    cut = cut_middle(text, 100)

    assert cut.startswith("a" * 50)
    assert cut.endswith("z" * 50)
    assert "906 of 1006 characters left out" in cut
    assert cut_middle("short", 100) == "short"


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "</tool_response>", "<tool_call>"]
)
def test_active_text_is_taken_apart_and_other_text_stays(token: str) -> None:
    assert token not in neutralise(f"x{token}y")
    assert neutralise("a <| b |> <b>x</b> 1 < 2") == "a <| b |> <b>x</b> 1 < 2"


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="two tools are called 'lookup'"):
        tools_by_name([Lookup(), Lookup()])


@pytest.mark.parametrize("field", ["wall_seconds", "total_bytes", "processes"])
def test_limits_must_be_above_zero(field: str) -> None:
    with pytest.raises(SandboxError, match=field):
        SandboxLimits(**{field: 0})
