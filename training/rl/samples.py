"""What lies in the buffer: rollouts with their advantages, and the optimizer steps that will use them.

Everything turns into plain values and tensors and back, so that a checkpoint can hold a buffer half used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..rollouts.types import Prompt, Rollout

# Of a rollout, everything but its prompt and what only reward functions read.
_ROLLOUT_FIELDS = (
    *("completion_ids", "logprobs", "loss_mask", "branch", "branch_logprob", "finished", "text", "tool_calls"),
    *("observation_pixel_values", "observation_grid_thw", "observation_types"),
)


@dataclass(slots=True, kw_only=True)
class Sample:
    """One rollout and what it is worth."""

    rollout: Rollout
    group: int
    """Which prompt of the buffer it answers."""
    reward: float | None
    """Weighted sum; None: not scored."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """By reward function."""
    advantage: float = 0.0
    tool_advantage: float = 0.0
    """HDPO's second advantage, else 0."""
    is_tool_member: bool = False
    """Takes part in HDPO's efficiency loss."""
    is_correct: bool = False
    tokens: int = 0
    """Policy tokens that count; 0 leaves the rollout out of the loss."""
    old_logprobs: list[float] | None = None
    """Per completion token, what ratios start from; None: the policy of the moment (ratio 1)."""
    ref_logprobs: list[float] | None = None
    """Under the reference model, where there is a KL term."""


class Row(NamedTuple):
    """A sample in a micro-batch. Weights are per token, coefficient and normaliser included."""

    sample: int
    weight: float = 0.0
    tool_weight: float = 0.0
    nll_weight: float = 0.0
    kl_weight: float = 0.0
    router_weight: float = 0.0
    """Of the one decision, not per token."""

    @property
    def is_padding(self) -> bool:
        """Only takes part so that every rank runs equally many forwards: nothing of it weighs anything."""
        return not any(self[1:])


MicroBatch = list[Row]


@dataclass(slots=True)
class StepPlan:
    """One optimizer step: equally many micro-batches on every rank."""

    micro_batches: list[MicroBatch]


@dataclass(slots=True)
class Buffer:
    """Rollouts of one filling and the steps that are left."""

    samples: list[Sample] = field(default_factory=list)
    steps: list[StepPlan] = field(default_factory=list)
    next_step: int = 0

    @property
    def is_empty(self) -> bool:
        """No step is left."""
        return self.next_step >= len(self.steps)

    def pop(self) -> StepPlan:
        """The next step; the caller makes sure that there is one."""
        step = self.steps[self.next_step]
        self.next_step += 1
        return step

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; prompts by their index. An empty buffer has nothing to say."""
        if self.is_empty:
            return {"samples": [], "steps": [], "next_step": 0}
        return {
            "samples": [_sample_state(sample) for sample in self.samples],
            "steps": [[[tuple(row) for row in batch] for batch in step.micro_batches] for step in self.steps],
            "next_step": self.next_step,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], prompt_of: Callable[[int], Prompt]) -> "Buffer":
        """Build a buffer again; `prompt_of` makes a prompt from its index. Rollouts of a prompt share one object."""
        prompts: dict[int, Prompt] = {}
        samples = []
        for values in state["samples"]:
            index = values["prompt"]
            prompt = prompts[index] if index in prompts else prompts.setdefault(index, prompt_of(index))
            others = {name: value for name, value in values.items() if name not in ("prompt", "rollout")}
            samples.append(Sample(rollout=Rollout(prompt=prompt, **values["rollout"]), **others))
        steps = [StepPlan([[Row(*row) for row in batch] for batch in step]) for step in state["steps"]]
        return cls(samples, steps, state["next_step"])


def _sample_state(sample: Sample) -> dict[str, Any]:
    own = {item.name: getattr(sample, item.name) for item in fields(sample) if item.name != "rollout"}
    rollout = {name: getattr(sample.rollout, name) for name in _ROLLOUT_FIELDS}
    return own | {"prompt": sample.rollout.prompt.index, "rollout": rollout}
