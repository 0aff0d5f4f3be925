"""Stage-RL in one file, to read: what `MetisRLTrainer` computes, without batches, buffers, ranks or checkpoints.

One rollout at a time goes through the model, all logits are there, every formula is written out. A test holds the
trainer to the numbers of this loop. To train something, use the trainer.

    for each filling:
        draw prompts, G rollouts each; drop prompts whose rollouts are all worth the same, and draw others for them
        advantage = (reward - mean of the group) / (std of the group + eps)
        for each optimizer step:  loss = sum over rollouts and tokens of the clipped surrogate / tokens of the step

Shapes: P prompts, G rollouts per prompt, T tokens of a rollout, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rollouts.engine import RolloutEngine
from .rollouts.types import Prompt, Rollout, Sampling

EPS = 1e-6
TIE = 1e-6

RewardOfRollouts = Callable[[list[Rollout]], list[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """The part of `MetisRLConfig` that this loop knows; same names, same defaults."""

    num_generations: int = 8
    prompts_per_step: int = 128
    updates_per_rollout: int = 1
    dynamic_sampling: bool = True
    max_sampling_rounds: int = 10
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0


@dataclass(slots=True)
class Judged:
    """A rollout and its advantage."""

    rollout: Rollout
    advantage: float
    old_logp_T: Tensor | None = None


def rl_loop(
    model: nn.Module,
    engine: RolloutEngine,
    prompts: Iterator[Prompt],
    reward: RewardOfRollouts,
    sampling: Sampling,
    settings: LoopSettings,
    steps: int,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> list[float]:
    """Train `model` in place.

    Args:
        model: dense or two-branch; what should not train has `requires_grad=False`.
        engine: samples from the same weights.
        prompts: an endless stream.
        reward: one number per rollout, None where it cannot be scored.
        sampling: also says at which temperature log-probabilities are taken, and what can never be sampled.
        steps: optimizer steps.
        optimizer_class: takes parameters, `lr` and `weight_decay`.
    Returns:
        The loss of each step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = optimizer_class(trained, lr=settings.learning_rate, weight_decay=0.0)  # type: ignore[call-arg]
    losses: list[float] = []
    while len(losses) < steps:
        groups = fill(engine, prompts, reward, sampling, settings)
        batches = [batch for batch in split(groups, settings.updates_per_rollout) if batch]
        # The first step's policy is the one that sampled; for the others it is written down before weights change.
        for judged in [judged for batch in batches[1:] for judged in batch]:
            with torch.no_grad():
                judged.old_logp_T = token_logprobs(model, judged.rollout, sampling)
        for batch in batches[: steps - len(losses)]:
            losses.append(update(model, optimizer, trained, batch, sampling, settings))
    return losses


def fill(
    engine: RolloutEngine,
    prompts: Iterator[Prompt],
    reward: RewardOfRollouts,
    sampling: Sampling,
    settings: LoopSettings,
) -> list[list[Judged]]:
    """Draw groups until there are enough that teach something."""
    wanted = settings.prompts_per_step * settings.updates_per_rollout
    groups: list[list[Judged]] = []
    for _ in range(settings.max_sampling_rounds):
        drawn = [next(prompts) for _ in range(wanted - len(groups))]
        for rollouts in engine.generate(drawn, settings.num_generations, sampling):
            rewards = reward(rollouts)
            scored = [value for value in rewards if value is not None]
            informative = len(scored) >= 2 and max(scored) - min(scored) > TIE * max(1.0, *map(abs, scored))
            if informative or not settings.dynamic_sampling:
                groups.append(judge(rollouts, rewards))
        if len(groups) == wanted:
            break
    return groups


def judge(rollouts: list[Rollout], rewards: list[float | None]) -> list[Judged]:
    """Advantages of one prompt's rollouts; those that were not scored are left out."""
    scored = [(rollout, value) for rollout, value in zip(rollouts, rewards, strict=True) if value is not None]
    values = [value for _, value in scored]
    if len(values) < 2 or max(values) - min(values) <= TIE * max(1.0, *map(abs, values)):
        return [Judged(rollout, 0.0) for rollout, _ in scored]
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return [Judged(rollout, (value - mean) / (std + EPS)) for rollout, value in scored]


def split(groups: list[list[Judged]], parts: int) -> list[list[Judged]]:
    """Cut the prompts of a filling into optimizer steps."""
    cuts = [number * len(groups) // parts for number in range(parts + 1)]
    return [[judged for group in groups[start:end] for judged in group] for start, end in itertools.pairwise(cuts)]


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    batch: list[Judged],
    sampling: Sampling,
    settings: LoopSettings,
) -> float:
    """One optimizer step; returns its loss."""
    model.train()
    optimizer.zero_grad()
    tokens = sum(sum(judged.rollout.loss_mask) for judged in batch)
    total = 0.0
    for judged in batch:
        logp_T = token_logprobs(model, judged.rollout, sampling)
        old_logp_T = logp_T.detach() if judged.old_logp_T is None else judged.old_logp_T
        cost_T = clipped_surrogate(logp_T, old_logp_T, judged.advantage, settings)
        loss = (cost_T * torch.tensor(judged.rollout.loss_mask)).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
    optimizer.step()
    return total


def clipped_surrogate(logp_T: Tensor, old_logp_T: Tensor, advantage: float, settings: LoopSettings) -> Tensor:
    """max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0 at most -A times `dual_clip`."""
    ratio_T = (logp_T - old_logp_T).exp()
    clipped_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    cost_T = torch.maximum(-advantage * ratio_T, -advantage * clipped_T)
    return cost_T.clamp(max=-advantage * settings.dual_clip) if advantage < 0 else cost_T


def token_logprobs(model: nn.Module, rollout: Rollout, sampling: Sampling) -> Tensor:
    """log p of each completion token at the sampling temperature, (T,) float32: one forward, all logits."""
    prompt = rollout.prompt
    types = prompt.mm_token_type_ids + (rollout.observation_types or [0] * len(rollout.completion_ids))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([rollout.prompt_ids + rollout.completion_ids]),
        "mm_token_type_ids": torch.tensor([types]),
    }
    pixels = [value for value in (prompt.pixel_values, rollout.observation_pixel_values) if value is not None]
    grids = [value for value in (prompt.image_grid_thw, rollout.observation_grid_thw) if value is not None]
    if pixels:
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
    if rollout.branch is not None:
        inputs["branch_ids"] = rollout.branch
    logits_TV = model(**inputs).logits[0].float() / sampling.temperature
    logits_TV[:, list(sampling.suppress_token_ids)] = -torch.inf
    # The distribution of a token is at the position before it.
    logp_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    return logp_TV.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
