"""How a model calls a tool and what comes back, in the format of Qwen's chat templates.

    <tool_call>                                   <tool_response>
    {"name": "python", "arguments": {...}}        (text and images)
    </tool_call>                                  </tool_response>

Calls stand in the assistant's turn, observations in the user turn after it. What a model writes is not trusted: calls
that cannot be read become observations that say why. What a tool returns is not trusted either: it is cut to its
limits, and text that looks like a special token or a tag of this format is taken apart, so that no observation can end
itself, begin a turn, or claim an image that is not there.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from ...errors import RecipeError
from ...media import Message
from .limits import ToolLimits

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"

ErrorKind = Literal[
    "malformed_call", "unknown_tool", "bad_arguments", "repeated_call", "too_many_calls", "limit", "failed", "time"
]

MAX_CALL_CHARACTERS = 65536  # ours: a longer call is not parsed
_CUT = "\n[... {} of {} characters left out ...]\n"
_CALL_TAG = re.compile(r"</?tool_call>")
# A special token of the Qwen family (<|im_end|>, <|image_pad|>, ...) or a tag of the protocol.
_ACTIVE = re.compile(r"<(?=\|[A-Za-z0-9_]+\|>|/?tool_call>|/?tool_response>)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What one call gives: text and images for the model, and how it went for the metrics."""

    text: str
    images: tuple[Image.Image, ...] = ()
    ok: bool = True
    error: ErrorKind | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One `<tool_call>` block of a turn. `problem` says why it cannot be run; then name and arguments are empty."""

    name: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None

    @property
    def key(self) -> str:
        """The same for calls that ask the same: key order and spaces of the JSON do not matter."""
        return json.dumps([self.name, self.arguments], sort_keys=True)


@dataclass(slots=True, kw_only=True)
class ToolContext:
    """What belongs to one trajectory: its files, its images, the calls it made. Never shared between trajectories."""

    limits: ToolLimits = field(default_factory=ToolLimits)
    files: dict[str, bytes] = field(default_factory=dict)
    """The trajectory's folder: tools that write files keep them here between calls."""
    images: tuple[Image.Image, ...] = ()
    """The images of the question, for tools that look at them."""
    made_calls: set[str] = field(default_factory=set)
    """Keys of the calls that were run."""
    seconds: float = 0.0
    """Time spent in tools so far."""


class Tool(Protocol):
    """Something a model can call."""

    @property
    def name(self) -> str:
        """What the model writes to call it."""

    @property
    def description(self) -> Mapping[str, object]:
        """The JSON schema that chat templates take as one element of `tools=`: {"type": "function", ...}."""

    def run(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """Do it. Errors of the call are results with ok=False; raises only where the tool itself is broken."""


def describe(name: str, description: str, parameters: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The schema of a tool whose parameters are all required, except those with a "default"."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: dict(value) for key, value in parameters.items()},
                "required": [key for key, value in parameters.items() if "default" not in value],
            },
        },
    }


def system_prompt_with_tools(system_prompt: str, tools: Sequence[Tool]) -> str:
    """The system turn that Qwen2.5's and Qwen3's templates write for `tools=`; Qwen2.5-VL's template ignores `tools`.

    With no tools the prompt stays as it is.
    """
    if not tools:
        return system_prompt
    # As the templates' tojson filter writes it: keys in their order, no escapes of letters.
    listed = "".join("\n" + json.dumps(tool.description, ensure_ascii=False) for tool in tools)
    return (
        f"{system_prompt}\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        f'XML tags:\n{CALL_OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CALL_CLOSE}'
    )


def parse_calls(text: str) -> list[ToolCall]:
    """All tool calls of one assistant turn, in order; blocks that cannot be read have a `problem`.

    A block that the token limit cut (no closing tag) is a problem too, unless its JSON is whole: engines that stop at
    `</tool_call>` may leave the tag out. Text inside <think> counts like any other: the template draws no line there.
    """
    calls = []
    opened: int | None = None
    for tag in _CALL_TAG.finditer(text):
        if tag.group() == CALL_OPEN:
            if opened is not None:
                calls.append(_problem("it is not closed with </tool_call> before the next one opens"))
            opened = tag.end()
        elif opened is None:
            calls.append(_problem("a </tool_call> stands without <tool_call> before it"))
        else:
            calls.append(_read_call(text[opened : tag.start()]))
            opened = None
    if opened is not None:
        last = _read_call(text[opened:])
        calls.append(last if last.problem is None else _problem("it is not closed with </tool_call>"))
    return calls


def check_arguments(tool: Tool, arguments: Mapping[str, object]) -> str | None:
    """Why these arguments do not fit the tool's schema (names and plain types), or None."""
    function = tool.description["function"]
    assert isinstance(function, Mapping)
    schema = function["parameters"]
    properties: Mapping[str, Mapping[str, object]] = schema["properties"]
    missing = [name for name in schema["required"] if name not in arguments]
    unknown = [name for name in arguments if name not in properties]
    if missing or unknown:
        found = ", ".join(arguments) or "none"
        return f"expected the arguments {', '.join(properties)}; found {found}"
    for name, value in arguments.items():
        wanted = properties[name].get("type")
        if isinstance(wanted, str) and not _is_a(value, wanted):
            return f"the argument {name} is of type {_json_type(value)}; expected {wanted}"
    return None


def observation_blocks(results: Sequence[ToolResult], limits: ToolLimits) -> list[dict[str, object]]:
    """The content of the user turn that answers a turn's calls: text and image blocks.

    Rendered, it is what Qwen's templates write for messages of the role "tool": a <tool_response> for each result, one
    line end between them. Text is cut in the middle before it is put together with the images, so no image is ever cut.
    """
    blocks: list[dict[str, object]] = []
    room = limits.images
    for number, result in enumerate(results):
        images = result.images[:room]
        room -= len(images)
        text = neutralise(cut_middle(result.text, limits.text_characters))
        if len(images) < len(result.images):
            text += f"\n[{len(result.images) - len(images)} of {len(result.images)} images left out]"
        opening = ("\n" if number else "") + RESPONSE_OPEN + "\n"
        blocks.append({"type": "text", "text": opening + text + ("\n" if text and images else "")})
        blocks += [{"type": "image", "image": fit_image(image, limits.image_pixels)} for image in images]
        blocks.append({"type": "text", "text": "\n" + RESPONSE_CLOSE})
    return _join_text(blocks)


def observation(results: Sequence[ToolResult], limits: ToolLimits) -> Message:
    """`observation_blocks` as a message."""
    return {"role": "user", "content": observation_blocks(results, limits)}


def neutralise(text: str) -> str:
    """Take apart what the template or the tokenizer would read as more than text: `<|im_end|>` -> `< |im_end|>`."""
    return _ACTIVE.sub("< ", text)


def cut_middle(text: str, limit: int) -> str:
    """At most `limit` characters of a text (and a note): its beginning and its end, where results and errors stand."""
    if len(text) <= limit:
        return text
    head = (limit + 1) // 2
    tail = limit - head
    return text[:head] + _CUT.format(len(text) - limit, len(text)) + (text[-tail:] if tail else "")


def fit_image(image: Image.Image, pixels: int) -> Image.Image:
    """An RGB copy of at most this area; never enlarged, each side at least 28 where the processor needs one patch."""
    width, height = image.size
    if width * height > pixels:
        scale = (pixels / (width * height)) ** 0.5
        image = image.resize((max(1, int(width * scale)), max(1, int(height * scale))))
    return image if image.mode == "RGB" else image.convert("RGB")


def failure(kind: ErrorKind, text: str, seconds: float = 0.0) -> ToolResult:
    """A result that tells the model what went wrong."""
    return ToolResult(text=f"Error: {text}", ok=False, error=kind, seconds=seconds)


def tools_by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Raises RecipeError where two tools have one name."""
    by_name: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in by_name:
            raise RecipeError(f"two tools are called {tool.name!r}. Expected each name once.")
        by_name[tool.name] = tool
    return by_name


def _read_call(text: str) -> ToolCall:
    if len(text) > MAX_CALL_CHARACTERS:
        return _problem(f"it has {len(text)} characters; at most {MAX_CALL_CHARACTERS} are read")
    try:
        call = json.loads(text, strict=False)  # models write line ends into strings
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        return _problem(f"it is not valid JSON: {reason}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return _problem('expected {"name": <function-name>, "arguments": <args-json-object>}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return _problem(f"its arguments are of type {_json_type(arguments)}; expected an object")
    return ToolCall(name=call["name"], arguments=arguments)


def _problem(reason: str) -> ToolCall:
    return ToolCall(problem=f"the tool call cannot be read: {reason}.")


def _json_type(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _is_a(value: object, wanted: str) -> bool:
    found = _json_type(value)
    return found == wanted or (found, wanted) == ("integer", "number")


def _join_text(blocks: list[dict[str, object]]) -> list[dict[str, object]]:
    """Neighbouring text as one block: fewer blocks, the same rendering."""
    joined: list[dict[str, object]] = []
    for block in blocks:
        if joined and block["type"] == "text" == joined[-1]["type"]:
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}{block['text']}"}
        else:
            joined.append(block)
    return joined
