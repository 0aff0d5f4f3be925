"""`Prompt` and `Rollout`: token ids in, token ids out; nothing is ever decoded and encoded again.

Shapes: T tokens; pixel values are (patches, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from metis_home.branch import Branch
from metis_home.errors import EngineError
from metis_home.media import Message

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.encode import Encoder, Example
    from ..data.records import Record

WantedBranch = Literal["router", "sample"] | Branch | None


@dataclass(slots=True, kw_only=True)
class Prompt:
    """What is to be answered, tokenized once. Pixels are kept here, once for all rollouts of the prompt."""

    index: int
    """Position in the list of training records."""
    id: str
    input_ids: list[int]
    mm_token_type_ids: list[int]
    """0 text, 1 image."""
    pixel_values: "Tensor | None" = None
    """(patches of all images, D) float32."""
    image_grid_thw: "Tensor | None" = None
    """(images, 3) int64, in patches."""
    images: tuple[object, ...] = ()
    """The images' sources (paths, bytes, PIL) in order, for engines that take images by reference and for reports."""
    messages: list[Message] = field(default_factory=list)
    """The conversation, which reward functions get."""
    columns: dict[str, object] = field(default_factory=dict)
    """One value per column that reward functions get: solution, kind, source and the record's own columns."""
    positions: "Tensor | None" = None
    """M-RoPE positions of the prompt, (3, T) int64; filled in by whoever first needs them."""
    next_position: int = 0
    """M-RoPE position of the first token after the prompt; valid where `positions` is there."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One answer, or a whole conversation with tools, to a prompt."""

    prompt: Prompt
    completion_ids: list[int]
    """Everything after the prompt: tokens of the policy (the end token too) and of observations."""
    logprobs: list[float]
    """The sampler's log-probability of each completion token, nats, at the sampling temperature; 0 at observations."""
    loss_mask: list[int]
    """1 where the policy chose the token, 0 at observations (tool results and the template around them)."""
    branch: int | None = None
    """The branch that answered, a `Branch` value; None: a dense model. The update uses this one, wherever the router
    has moved to."""
    branch_logprob: float = 0.0
    """log P(branch) by the router where the branch was sampled, else 0; nats."""
    finished: bool = True
    """The policy ended the answer itself; False where a limit cut it."""
    text: str = ""
    """The policy's own text without special tokens, for reward functions."""
    tool_calls: int = 0
    """Tool turns that were carried out."""
    observation_pixel_values: "Tensor | None" = None
    """Pixels of images that tools returned, in the order of their tokens, (patches, D)."""
    observation_grid_thw: "Tensor | None" = None
    """(images, 3), in patches."""
    observation_types: list[int] | None = None
    """`mm_token_type_ids` of the completion where it holds images; None: all text."""
    messages: list[Message] = field(default_factory=list)
    """The completion as messages where it has several turns; empty: one assistant message of `text`."""
    columns: dict[str, object] = field(default_factory=dict)
    """Further values that an environment gives to reward functions."""

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self.prompt.input_ids

    @property
    def policy_tokens(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(self.loss_mask)

    def __len__(self) -> int:
        return len(self.prompt.input_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy, whose log-probabilities are those of temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    eos_token_ids: tuple[int, ...] = ()
    suppress_token_ids: tuple[int, ...] = ()
    """Never sampled, and left out of the distribution that log-probabilities refer to: an image token of the policy's
    own would have no image."""
    stop: tuple[str, ...] = ()
    """Texts after which a turn ends, for example "</tool_call>"; they stay part of the completion."""
    branch: WantedBranch = None
    """Two-branch models: a `Branch` forces it, "router" asks (threshold), "sample" draws from the router's
    probability; None: a dense model."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            EngineError: one of them is out of range.
        """
        if self.max_new_tokens < 1:
            raise EngineError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise EngineError(
                f"sampling with temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: expected "
                "temperature >= 0, 0 < top_p <= 1, top_k >= 0"
            )


def make_prompt(record: "Record", encoder: "Encoder", *, index: int) -> Prompt:
    """Tokenize a record as a prompt: it carries no prefix of a branch, as in training.

    Raises:
        DataError: more than the encoder's `max_length` tokens. ProcessorError: an image cannot be used.
    """
    from ..data.conversation import image_sources

    example: Example = encoder.prompt(record)
    columns = {
        **record.columns,
        "solution": record.answer,
        "kind": record.kind,
        "source": record.source,
        "mode": record.mode,
        "id": record.id,
    }
    return Prompt(
        index=index,
        id=record.id,
        input_ids=example.input_ids,
        mm_token_type_ids=example.mm_token_type_ids,
        pixel_values=example.pixel_values,
        image_grid_thw=example.image_grid_thw,
        images=tuple(image_sources(record.messages)),
        messages=encoder.messages(record),
        columns=columns,
    )


def check_rollouts(rollouts: Sequence[Rollout], suppress_token_ids: Sequence[int]) -> None:
    """Raise unless every rollout is something that a policy can be trained on.

    Raises:
        EngineError: lengths differ, nothing was generated, a log-probability is no number, or the policy is said to
            have chosen a token that must not be sampled.
    """
    forbidden = set(suppress_token_ids)
    for rollout in rollouts:
        lengths = {len(rollout.completion_ids), len(rollout.logprobs), len(rollout.loss_mask)}
        if len(lengths) != 1 or lengths == {0}:
            raise EngineError(
                f"a rollout of prompt {rollout.prompt.id!r} has {len(rollout.completion_ids)} token ids, "
                f"{len(rollout.logprobs)} log-probabilities and {len(rollout.loss_mask)} mask values; expected one of "
                "each per token, and at least one token"
            )
        for position, (token, logprob, counts) in enumerate(
            zip(rollout.completion_ids, rollout.logprobs, rollout.loss_mask, strict=True)
        ):
            if counts and (token in forbidden or not logprob <= 1e-3):
                raise EngineError(
                    f"rollout of prompt {rollout.prompt.id!r}, token {position}: id {token}, log-probability {logprob}. "
                    "Expected a number <= 0 and none of the suppressed tokens (image and video placeholders)."
                )
