"""`RolloutEngine`: what the trainer asks of anything that generates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates rollouts and takes over new weights."""

    shares_weights: bool
    """The engine computes with the very weights that are trained, in the trainer's precision: its log-probabilities
    are the trainer's, no correction and no recomputation is needed. False for servers and quantised copies."""

    def generate(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> list[list[Rollout]]:
        """Answer each prompt `num_generations` times.

        Args:
            prompts: may be empty (a rank that has enough); images by pixels or, for servers, by `Prompt.images`.
            num_generations: G.
            sampling: how; `suppress_token_ids` must never be sampled.
        Returns:
            One list of G rollouts per prompt, in the prompts' order. Token ids and log-probabilities are those of the
            sampler; nothing is decoded and encoded again.
        Raises:
            EngineError: the engine failed, or cannot do what was asked.
        """
        ...

    def update_weights(self, model: "nn.Module") -> None:
        """Answer with the weights of `model` (unwrapped) from now on. Nothing to do where weights are shared."""
        ...

    def seed(self, seed: int) -> None:
        """Begin the engine's random numbers anew; the same seed and prompts give the same rollouts."""
        ...

    def state_dict(self) -> dict[str, object]:
        """What is needed to go on sampling exactly here: random states. Tensors and plain values only."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up a state that `state_dict` returned."""
        ...
