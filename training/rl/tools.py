"""Tools in Stage-RL: which ones, what prompts say about them, and rollouts that use them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from metis_home.errors import RecipeError
from metis_home.media import Message

from ..data.records import Record
from ..rollouts.engine import RolloutEngine
from ..rollouts.tool_rollouts import ToolRollouts
from ..tools.environment import ConversationLimits
from ..tools.protocol import Tool, system_prompt_with_tools
from ..tools.registry import make_tools
from .config import MetisRLConfig

if TYPE_CHECKING:
    from metis_home.processing import MetisHomeProcessor

_QWENS = "You are a helpful assistant."  # what Qwen's templates write where nothing is given
_DESCRIBED = "<tools>"


def tools_of(args: MetisRLConfig, given: Sequence[Tool] | None) -> list[Tool]:
    """The tools of a run: objects that the caller made, or those that the settings list.

    Raises:
        RecipeError: both, or an unknown tool or option. SandboxError: no sandbox can be made.
    """
    if given and args.tools:
        raise RecipeError("tools were given as objects and in the settings; expected one of them")
    return list(given) if given else make_tools(args.tools or [], unsafe_local=args.unsafe_local)


def describe_tools(
    records: Sequence[Record], system_prompt: str | None, tools: Sequence[Tool], args: MetisRLConfig
) -> tuple[list[Record], str | None]:
    """Put the tools' schemas into the system prompt, and into the system message of rows that have their own.

    Nothing changes without tools, with `describe_tools: false`, and in rows whose system message has `<tools>` already.
    """
    if not tools or not args.describe_tools:
        return list(records), system_prompt
    return (
        [replace(record, messages=_described(record.messages, tools)) for record in records],
        system_prompt_with_tools(_QWENS if system_prompt is None else system_prompt, tools),
    )


def with_tools(
    engine: RolloutEngine, processor: "MetisHomeProcessor", tools: Sequence[Tool], args: MetisRLConfig
) -> RolloutEngine:
    """The engine itself without tools, else one that holds conversations by it."""
    if not tools:
        return engine
    limits = ConversationLimits(
        turns=args.max_tool_turns + 1,
        calls_per_turn=args.max_calls_per_turn,
        observation_tokens=args.max_observation_tokens,
        response_tokens=args.max_completion_tokens,
        seconds=args.tool_seconds,
    )
    return ToolRollouts(
        engine,
        processor,
        tools,
        limits=limits,
        workers=args.tool_workers,
        allow_remote=processor.allow_remote_media,
    )


def _described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    first, *rest = messages
    text = first["content"]
    if first["role"] != "system":
        return list(messages)
    if not isinstance(text, str):
        text = "".join(str(block.get("text", "")) for block in text)  # type: ignore[attr-defined]
    return (
        list(messages) if _DESCRIBED in text else [{**first, "content": system_prompt_with_tools(text, tools)}, *rest]
    )
