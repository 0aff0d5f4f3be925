"""A conversation with tools as a state machine: it knows the rules, an engine outside does the generating.

    prompt -> [engine: a turn's token ids] -> advance -> observation ids, images -> [engine: the next turn] -> ... -> done

Generated ids are kept as they came and never decoded and encoded again; what stands between two turns is tokenized by
itself. It begins and ends at special tokens, which no tokenizer merges with anything, so the ids put together are the
ids of the template's rendering. Observations have loss mask 0, generated tokens 1.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from PIL import Image

from ...errors import TrainingError
from ...media import Message
from ...responses import END_TOKENS
from .protocol import (
    CALL_CLOSE,
    Tool,
    ToolCall,
    ToolContext,
    ToolResult,
    check_arguments,
    failure,
    observation,
    parse_calls,
    tools_by_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...processing import MetisHomeProcessor

STOP_STRINGS = (CALL_CLOSE,)  # an engine ends a turn there; the tag itself is kept

Finish = Literal["answered", "max_turns", "token_limit"]

# Stand for the texts before and in a turn when the template is asked what it writes after one.
_ASKED, _SAID = "metis-home-question", "metis-home-turn"
_SHORTEST_TEXT = 64  # characters of a result that is shortened to fit


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationLimits:
    """Bounds of one trajectory; the numbers are those of HDPO's published run, `calls_per_turn` is ours."""

    turns: int = 10
    """Assistant turns. A call on the last one is not executed and not counted."""
    calls_per_turn: int = 4
    observation_tokens: int = 8192
    """Of what stands between two turns, image tokens included; text is shortened and images are left out to fit."""
    response_tokens: int = 16384
    """Of everything after the prompt. An observation that would pass it ends the trajectory."""
    seconds: float = 400.0
    """Spent in tools, all calls together. Later calls are refused, so that the model can still answer."""

    def __post_init__(self) -> None:
        """Raises TrainingError for a bound that is not above zero."""
        for name, value in asdict(self).items():
            if not value > 0:
                raise TrainingError(f"the conversation limit {name} is {value}. Expected a number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of the sequence after the prompt."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 for every generated token, 0 for every other."""
    mm_token_type_ids: list[int]
    """1 for image tokens, else 0."""
    images: tuple[Image.Image, ...] = ()
    pixel_values: "Tensor | None" = None  # (patches, D)
    image_grid_thw: "Tensor | None" = None  # (images, 3)


@dataclass(slots=True, kw_only=True)
class ToolConversation:
    """One trajectory.

    Args:
        processor: tokenizer and image processor of the model, with its chat template.
        tools: what can be called; the prompt must describe them (`system_prompt_with_tools`).
        context: the trajectory's files and images; never shared.
        enable_thinking: what the prompt was rendered with; every later turn begins the same way.
    """

    processor: "MetisHomeProcessor"
    tools: Sequence[Tool]
    limits: ConversationLimits = field(default_factory=ConversationLimits)
    context: ToolContext = field(default_factory=ToolContext)
    enable_thinking: bool | None = None

    pieces: list[Piece] = field(default_factory=list, init=False)
    messages: list[Message] = field(default_factory=list, init=False)
    """What was said after the prompt, as messages: assistant turns as text, observations as blocks."""
    turns: int = field(default=0, init=False)
    tool_turns: int = field(default=0, init=False)
    """T of HDPO: turns whose calls were executed; turns with failed calls count."""
    results: list[ToolResult] = field(default_factory=list, init=False)
    finish: Finish | None = field(default=None, init=False)
    _ended: bool = field(default=False, init=False)
    """The last turn came with its end token."""

    def advance(self, generated_ids: Sequence[int], *, truncated: bool = False) -> Piece | None:
        """Take one generated turn; run its calls; return what comes before the next turn, or None when it is over.

        Raises:
            TrainingError: the conversation is over, or the turn holds image or video tokens.
            SandboxError: a tool is broken (not: a call failed).
        """
        calls = self.take_turn(generated_ids, truncated=truncated)
        return self.observe(self.run(calls)) if calls else None

    def take_turn(self, generated_ids: Sequence[int], *, truncated: bool = False) -> list[ToolCall]:
        """Take one generated turn; return the calls that are to be run, none when the conversation is over.

        Args:
            generated_ids: the turn's tokens as sampled, with its end token if there was one.
            truncated: the engine ended the turn at a limit of tokens: nothing in it is executed.
        Raises:
            TrainingError: the conversation is over, or the turn holds image or video tokens.
        """
        if self.finish is not None:
            raise TrainingError(f"the conversation is over ({self.finish}); no turn can be added.")
        ids = [int(token) for token in generated_ids]
        self._add_generated(ids)
        text, self._ended = self._text(ids)
        self.turns += 1
        self.messages.append({"role": "assistant", "content": text})
        calls = parse_calls(text)
        if truncated:
            self.finish = "token_limit"
        elif not calls:
            self.finish = "answered"
        elif self.turns >= self.limits.turns:
            self.finish = "max_turns"
        return [] if self.finish is not None else calls

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run the calls of a turn. Touches the context and the tools only, no tokenizer: other threads may do it.

        Raises:
            SandboxError: a tool is broken (not: a call failed).
        """
        by_name = tools_by_name(self.tools)
        results = []
        for number, call in enumerate(calls):
            if number >= self.limits.calls_per_turn:
                results.append(
                    failure("too_many_calls", f"only {self.limits.calls_per_turn} calls are run in one turn")
                )
                break
            result = run_call(call, by_name, self.context, self.limits.seconds)
            self.context.seconds += result.seconds
            results.append(result)
        return results

    def observe(self, results: Sequence[ToolResult]) -> Piece | None:
        """Take the results of the last turn's calls; return what comes before the next turn, or None when it is over.

        Raises:
            ValueError: the image processor cannot use an image; nothing has changed then.
        """
        message, piece = self._observe(results, self._ended)
        self.tool_turns += 1
        self.results += results
        if piece is None or len(piece.input_ids) >= self.tokens_left:
            self.finish = "token_limit"
            return None
        self.messages.append(message)
        self.pieces.append(piece)
        return piece

    @property
    def tokens_left(self) -> int:
        """How many tokens the next turn may have at most, under the limit of the whole response."""
        return self.limits.response_tokens - sum(len(piece.input_ids) for piece in self.pieces)

    @property
    def input_ids(self) -> list[int]:
        """All tokens after the prompt."""
        return [token for piece in self.pieces for token in piece.input_ids]

    @property
    def loss_mask(self) -> list[int]:
        """1 for generated tokens, 0 for observations and the template's separators; as long as `input_ids`."""
        return [bit for piece in self.pieces for bit in piece.loss_mask]

    @property
    def mm_token_type_ids(self) -> list[int]:
        """1 at image tokens, else 0; as long as `input_ids`."""
        return [kind for piece in self.pieces for kind in piece.mm_token_type_ids]

    @property
    def images(self) -> list[Image.Image]:
        """Images of all observations, in order."""
        return [image for piece in self.pieces for image in piece.images]

    def _add_generated(self, ids: list[int]) -> None:
        media = {self.processor.image_token_id, self.processor.video_token_id}
        if found := media.intersection(ids):
            raise TrainingError(
                f"the generated turn holds the media tokens {sorted(found)}, for which there is no image. Suppress them "
                "while sampling."
            )
        self.pieces.append(Piece(input_ids=ids, loss_mask=[1] * len(ids), mm_token_type_ids=[0] * len(ids)))

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """The turn's text without its end token, and whether it had one."""
        tokenizer = self.processor.tokenizer
        ends = {token for token in tokenizer.convert_tokens_to_ids(list(END_TOKENS)) if token is not None}
        ended = bool(ids) and ids[-1] in ends
        text = tokenizer.decode(ids[:-1] if ended else ids, clean_up_tokenization_spaces=False)
        return text, ended

    def _observe(self, results: Sequence[ToolResult], ended: bool) -> tuple[Message, Piece | None]:
        """The observation, shortened until it fits: first its texts, by halves, then its images. None: it cannot."""
        limits = self.context.limits
        while True:
            message = observation(results, limits)
            piece = self._between_turns(message, ended)
            if len(piece.input_ids) <= self.limits.observation_tokens:
                return message, piece
            if limits.text_characters > _SHORTEST_TEXT:
                limits = replace(limits, text_characters=limits.text_characters // 2)
            elif piece.images:
                limits = replace(limits, images=len(piece.images) - 1)
            else:
                return message, None

    def _between_turns(self, message: Message, ended: bool) -> Piece:
        """Tokenize end of turn, observation and the beginning of the next turn."""
        text = self._separator(message)
        if ended:  # the model wrote the end token itself
            end = next(token for token in END_TOKENS if text.startswith(token))
            text = text.removeprefix(end)
        content = message["content"]
        assert isinstance(content, list)
        images = tuple(block["image"] for block in content if block["type"] == "image")
        inputs = self.processor(text=[text], images=list(images) or None, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        image_token = self.processor.image_token_id
        return Piece(
            input_ids=ids,
            loss_mask=[0] * len(ids),
            mm_token_type_ids=[int(token == image_token) for token in ids],
            images=images,
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
        )

    def _separator(self, message: Message) -> str:
        """What the template writes from the end of an assistant's text to the beginning of the next one."""
        asked = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}, message]
        rendered = self.processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=False, enable_thinking=self.enable_thinking
        )
        _, found, after = rendered.partition(_SAID)
        if not found or not after.startswith(END_TOKENS):
            raise TrainingError(
                f"the chat template does not end an assistant's turn with one of {', '.join(END_TOKENS)}: it writes "
                f"{after[:40]!r}. Multi-turn rollouts need a template of the Qwen family."
            )
        return after


def run_call(call: ToolCall, tools: dict[str, Tool], context: ToolContext, seconds: float) -> ToolResult:
    """Run one call, whatever the model wrote: every fault of the call is a result that says so.

    Args:
        seconds: how long the trajectory's tools may take in all; nothing is started after that.
    """
    if call.problem is not None:
        return failure("malformed_call", call.problem)
    tool = tools.get(call.name)
    if tool is None:
        return failure("unknown_tool", f"there is no tool {call.name[:100]!r}. There is: {', '.join(tools)}")
    if (problem := check_arguments(tool, call.arguments)) is not None:
        return failure("bad_arguments", problem)
    if call.key in context.made_calls:
        return failure("repeated_call", "this call was made before, with the same arguments; see its result above")
    if context.seconds > seconds:
        return failure("time", f"the time for tools is used up ({seconds:g} s)")
    context.made_calls.add(call.key)
    start = time.monotonic()
    result = tool.run(call.arguments, context)
    return replace(result, seconds=time.monotonic() - start)
