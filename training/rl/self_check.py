"""Before the first step: do sampler and trainer see the same model?

Rollouts of prompts of different lengths, images among them, are generated in one left-padded batch, and scored again by
the forward that training uses. A difference means that ratios are wrong from the first step: another position rule,
another padding, another precision, stale weights in a server.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from metis_home.errors import TrainingError

from .. import collectives
from ..rollouts.engine import RolloutEngine
from ..rollouts.types import Prompt, Sampling
from .config import MetisRLConfig
from .prompts import PromptSource
from .samples import Row, Sample, StepPlan
from .update import Updater

logger = logging.getLogger(__name__)
_PROMPTS = 4
_TOKENS = 16
_LOOKED_AT = 16


def check_log_probabilities(
    engine: RolloutEngine,
    source: PromptSource,
    sampling: Sampling,
    updater: Updater,
    model: nn.Module,
    config: MetisRLConfig,
) -> float:
    """Print the largest difference of log-probabilities between sampler and trainer, over all ranks.

    The engine's random state is left as it was.

    Returns:
        That difference, nats.
    Raises:
        TrainingError: it is above the tolerance.
    """
    state = engine.state_dict()
    prompts = _different(source)
    short = replace(sampling, max_new_tokens=min(_TOKENS, sampling.max_new_tokens), stop=())
    rollouts = [rollout for group in engine.generate(prompts, 1, short) for rollout in group]
    engine.load_state_dict(state)

    samples = [
        Sample(rollout=rollout, group=number, reward=None, tokens=rollout.policy_tokens)
        for number, rollout in enumerate(rollouts)
    ]
    branches = dict.fromkeys(rollout.branch for rollout in rollouts)
    batches = [[Row(n) for n, sample in enumerate(samples) if sample.rollout.branch == branch] for branch in branches]
    wanted = int(collectives.max_over_ranks([len(batches)])[0])
    batches += [batches[0]] * (wanted - len(batches))
    scores = updater.score_samples(model, samples, [StepPlan(batches)])
    gaps = torch.cat([(torch.tensor(scores[n]) - torch.tensor(r.logprobs)).abs() for n, r in enumerate(rollouts)])
    worst = collectives.max_over_ranks([float(gaps.max())])[0]

    tolerance = config.self_check_tolerance
    if tolerance is None:
        tolerance = 1e-3 if updater.is_float32() and engine.shares_weights else 0.3
    images = sum(prompt.pixel_values is not None for prompt in prompts)
    logger.info(
        "self-check: %d prompts of %d to %d tokens (%d with images), log-probabilities of sampler and trainer differ by "
        "at most %.2g nats (tolerance %.2g)",
        len(prompts),
        min(map(len, prompts)),
        max(map(len, prompts)),
        images,
        worst,
        tolerance,
    )
    if not worst <= tolerance:
        raise TrainingError(
            f"log-probabilities of the sampler and of the trainer differ by {worst:.3g} nats (mean "
            f"{float(gaps.mean()):.3g}); expected at most {tolerance:.3g}. They must come from the same weights, "
            "temperature, positions and precision. If the difference is what the engine's precision costs, set "
            "self_check_tolerance."
        )
    return worst


def _different(source: PromptSource) -> Sequence[Prompt]:
    """A few prompts: with and without images where there are both, of lengths as different as possible."""
    seen = [source.prompt(index) for index in source.usable[:_LOOKED_AT]]
    ordered = sorted(seen, key=lambda prompt: (len(prompt), prompt.index))
    chosen = [ordered[0], ordered[-1]]
    for has_images in (True, False):
        chosen += [prompt for prompt in ordered if (prompt.pixel_values is not None) == has_images][:1]
    unique = {prompt.index: prompt for prompt in [*chosen, *ordered]}
    return list(unique.values())[:_PROMPTS]
