"""`ToolRollouts`: whole conversations with tools, by any engine that generates single turns.

    prompts --inner engine--> first turns --calls--> threads --results--> observations --> prompts of the second turns ...

All conversations that still go on share the inner engine's batches. The next turn's prompt is the ids so far and the
observation's; nothing is decoded and encoded again. A tool that fails, hangs or returns nonsense is an observation that
says so: no tool can end a training run.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from metis_home.branch import Branch
from metis_home.media import load_image

from .. import collectives
from ..tools.environment import STOP_STRINGS, ConversationLimits, ToolConversation
from ..tools.limits import ToolLimits
from ..tools.protocol import Tool, ToolCall, ToolContext, ToolResult, tools_by_name
from ..tools.safe import SafeTool
from .engine import RolloutEngine
from .types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn

    from metis_home.processing import MetisHomeProcessor

logger = logging.getLogger(__name__)

_BRANCHES: tuple[Branch | None, ...] = (None, *Branch)


class ToolRollouts:
    """A rollout engine whose rollouts are conversations with tools.

    `Sampling.max_new_tokens` bounds the whole response: all turns and all observations. A rollout's log-probabilities
    are the inner engine's, 0 at observations; `tool_calls` is T, the tool turns that were executed; a branch is kept
    over all turns. `finished` is true where the policy gave an answer without a call.

    All ranks must call `generate` equally often: they run equally many turns, some with no prompts, because an inner
    engine may have to gather its weights from all of them.

    Args:
        inner: generates single turns, and must end them at `</tool_call>` (`Sampling.stop`).
        processor: tokenizer, image processor and chat template of the model.
        tools: what can be called; the prompts must describe them (`system_prompt_with_tools`).
        limits: of a conversation. tool_limits: of what one call gives back.
        workers: how many conversations run their tools at one time.
        allow_remote: images of prompts that are http addresses are fetched for the tools.
    """

    def __init__(
        self,
        inner: RolloutEngine,
        processor: "MetisHomeProcessor",
        tools: Sequence[Tool],
        *,
        limits: ConversationLimits | None = None,
        tool_limits: ToolLimits | None = None,
        workers: int = 8,
        allow_remote: bool = False,
    ) -> None:
        self.inner, self.processor, self.workers = inner, processor, workers
        self.limits = limits or ConversationLimits()
        self.tool_limits = tool_limits or ToolLimits()
        self.tools: list[Tool] = [SafeTool(tool, self.limits.seconds) for tool in tools_by_name(tools).values()]
        self.allow_remote = allow_remote
        self.shares_weights = inner.shares_weights
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    def generate(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> list[list[Rollout]]:
        """Hold `num_generations` conversations about each prompt, see `RolloutEngine.generate`.

        Raises:
            EngineError: the inner engine failed. TrainingError: it sampled an image token.
        """
        limits = replace(self.limits, response_tokens=min(self.limits.response_tokens, sampling.max_new_tokens))
        sampling = replace(sampling, max_new_tokens=limits.response_tokens, stop=(*sampling.stop, *STOP_STRINGS))
        groups = [
            [self._begin(rollout, limits) for rollout in rollouts]
            for rollouts in self.inner.generate(prompts, num_generations, sampling)
        ]
        conversations = [conversation for group in groups for conversation in group]
        while True:
            self._run_tools(conversations)
            going = [[one for one in conversations if one.goes_on and one.branch == branch] for branch in _BRANCHES]
            counts = collectives.max_over_ranks([len(part) for part in going])
            if not any(counts):
                break
            for branch, part, count in zip(_BRANCHES, going, counts, strict=True):
                if count:
                    self._next_turn(part, replace(sampling, branch=branch))
        for conversation in conversations:
            self._counts.update(result.error or "ok" for result in conversation.environment.results)
            self._seconds += conversation.environment.context.seconds
        return [[conversation.rollout() for conversation in group] for group in groups]

    def update_weights(self, model: "nn.Module") -> None:
        """See `RolloutEngine.update_weights`."""
        self.inner.update_weights(model)

    def seed(self, seed: int) -> None:
        """See `RolloutEngine.seed`."""
        self.inner.seed(seed)

    def state_dict(self) -> dict[str, object]:
        """The inner engine's state: conversations are whole, none is left open between two calls."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a state of the inner engine."""
        self.inner.load_state_dict(state)

    def take_metrics(self) -> dict[str, float]:
        """What the tools did on this rank since the last time: calls, seconds a call, share of each kind of failure."""
        counts, self._counts = self._counts, Counter()
        seconds, self._seconds = self._seconds, 0.0
        calls = sum(counts.values())
        if not calls:
            return {"tools/calls": 0.0}
        shares = {f"tools/{kind}": count / calls for kind, count in sorted(counts.items()) if kind != "ok"}
        return {
            "tools/calls": float(calls),
            "tools/seconds": seconds / calls,
            "tools/failures": 1 - counts["ok"] / calls,
            **shares,
        }

    def _begin(self, first: Rollout, limits: ConversationLimits) -> "_Conversation":
        environment = ToolConversation(
            processor=self.processor,
            tools=self.tools,
            limits=limits,
            context=ToolContext(limits=self.tool_limits),
        )
        conversation = _Conversation(prompt=first.prompt, environment=environment, branch=_branch(first.branch))
        conversation.branch_logprob = first.branch_logprob
        conversation.take(first)
        return conversation

    def _next_turn(self, conversations: "list[_Conversation]", sampling: Sampling) -> None:
        """Generate the next turn of conversations of one branch; longer ones than their own limit are cut there."""
        longest = max((one.environment.tokens_left for one in conversations), default=1)
        turns = self.inner.generate(
            [one.next_prompt() for one in conversations], 1, replace(sampling, max_new_tokens=longest)
        )
        for conversation, [turn] in zip(conversations, turns, strict=True):
            conversation.take(turn)

    def _run_tools(self, conversations: "list[_Conversation]") -> None:
        """Run the calls of all conversations in threads, then add the observations one after the other."""
        waiting = [one for one in conversations if one.calls]
        if not waiting:
            return
        self._give_images(waiting)
        if len(waiting) == 1 or self.workers == 1:
            results = [one.environment.run(one.calls) for one in waiting]
        else:
            with ThreadPoolExecutor(min(self.workers, len(waiting)), "tools") as pool:
                results = list(pool.map(lambda one: one.environment.run(one.calls), waiting))
        for conversation, found in zip(waiting, results, strict=True):
            conversation.observe(found)

    def _give_images(self, waiting: "list[_Conversation]") -> None:
        """Open the questions' images for the tools, once per prompt."""
        opened: dict[int, tuple[Image.Image, ...]] = {}
        for conversation in waiting:
            prompt, context = conversation.prompt, conversation.environment.context
            if prompt.images and not context.images:
                key = id(prompt)
                if key not in opened:
                    opened[key] = tuple(
                        load_image(source, allow_remote=self.allow_remote)  # type: ignore[arg-type]
                        for source in prompt.images
                    )
                context.images = opened[key]


@dataclass(slots=True, kw_only=True)
class _Conversation:
    """One conversation on its way to a rollout."""

    prompt: Prompt
    environment: ToolConversation
    branch: Branch | None
    branch_logprob: float = 0.0
    logprobs: list[float] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    """Of the last turn, not yet run."""

    @property
    def goes_on(self) -> bool:
        """There is a next turn."""
        return self.environment.finish is None

    def take(self, turn: Rollout) -> None:
        """Take a generated turn, cut at what is left of the response."""
        left = self.environment.tokens_left
        ids, logprobs = turn.completion_ids[:left], turn.logprobs[:left]
        is_cut = len(turn.completion_ids) > left
        self.logprobs += logprobs
        self.calls = self.environment.take_turn(ids, truncated=is_cut or not turn.finished)

    def observe(self, results: list[ToolResult]) -> None:
        """Add the observation; images that the image processor refuses are left out of it."""
        try:
            piece = self.environment.observe(results)
        except (ValueError, TypeError, OSError, ArithmeticError) as error:
            logger.warning("images of tools are left out, the image processor cannot use them: %s", error)
            note = "\n[images left out: they cannot be used]"
            without = [replace(one, text=one.text + note, images=()) if one.images else one for one in results]
            piece = self.environment.observe(without)
        self.calls = []
        if piece is not None:
            self.logprobs += [0.0] * len(piece.input_ids)

    def next_prompt(self) -> Prompt:
        """The ids so far as the prompt of the next turn, with the images so far."""
        pixels, grids = self._observed()
        return Prompt(
            index=self.prompt.index,
            id=self.prompt.id,
            input_ids=self.prompt.input_ids + self.environment.input_ids,
            mm_token_type_ids=self.prompt.mm_token_type_ids + self.environment.mm_token_type_ids,
            pixel_values=_cat(self.prompt.pixel_values, pixels),
            image_grid_thw=_cat(self.prompt.image_grid_thw, grids),
            images=(*self.prompt.images, *self.environment.images),
            messages=[*self.prompt.messages, *self.environment.messages],
            columns=self.prompt.columns,
        )

    def rollout(self) -> Rollout:
        """The whole conversation."""
        environment = self.environment
        pixels, grids = self._observed()
        said = [str(message["content"]) for message in environment.messages if message["role"] == "assistant"]
        return Rollout(
            prompt=self.prompt,
            completion_ids=environment.input_ids,
            logprobs=self.logprobs,
            loss_mask=environment.loss_mask,
            branch=None if self.branch is None else int(self.branch),
            branch_logprob=self.branch_logprob,
            finished=environment.finish == "answered",
            text="".join(said),
            tool_calls=environment.tool_turns,
            observation_pixel_values=pixels,
            observation_grid_thw=grids,
            observation_types=None if grids is None else environment.mm_token_type_ids,
            messages=environment.messages,
        )

    def _observed(self) -> "tuple[Tensor | None, Tensor | None]":
        """Pixels and grids of the images of all observations."""
        pieces = self.environment.pieces
        return _cat(*(piece.pixel_values for piece in pieces)), _cat(*(piece.image_grid_thw for piece in pieces))


def _branch(value: int | None) -> Branch | None:
    return None if value is None else Branch(value)


def _cat(*parts: "Tensor | None") -> "Tensor | None":
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
