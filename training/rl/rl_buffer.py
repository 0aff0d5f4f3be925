"""Filling the buffer: prompts -> rollouts -> rewards -> advantages by group -> (draw again) -> optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from metis_home.errors import RecipeError

from .. import collectives
from ..advantages import efficiency_members, grpo_advantages, hdpo_advantages, informative_groups, reward_tensor
from ..rollouts.engine import RolloutEngine
from ..rollouts.types import Prompt, Rollout, Sampling, check_rollouts
from .config import MetisRLConfig
from .metrics import Stopwatch
from .prompts import PromptSource
from .samples import Sample
from .scoring import Scorer, Scores


@dataclass(slots=True)
class Group:
    """A prompt's rollouts with their scores."""

    rollouts: list[Rollout]
    scores: Scores
    is_informative: bool


@dataclass(slots=True)
class Filling:
    """What one filling brought on this rank."""

    samples: list[Sample]
    groups: list[Group]
    """All that were drawn, the dropped ones too."""
    rounds: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: rollout, reward."""


class BufferFiller:
    """Draws groups until there are enough that teach something.

    Args:
        source: prompts of this rank.
        engine: generates. scorer: rewards.
        groups_per_filling: how many this rank needs.
    """

    def __init__(
        self,
        config: MetisRLConfig,
        source: PromptSource,
        engine: RolloutEngine,
        scorer: Scorer,
        sampling: Sampling,
        groups_per_filling: int,
    ) -> None:
        self.config, self.source, self.engine, self.scorer = config, source, engine, scorer
        self.sampling, self.needed = sampling, groups_per_filling
        self.correct_name = correct_reward_name(config, scorer.names)

    def fill(self, trainer_state: object = None) -> Filling:
        """Draw, score and compare. All ranks run equally many rounds; a rank that has enough asks for nothing.

        With dynamic sampling, prompts whose rollouts all have the same reward are dropped and others are drawn for
        them, at most `max_sampling_rounds` times; after that, fewer prompts are used.
        """
        groups: list[Group] = []
        kept: list[Group] = []
        clock = Stopwatch()
        rounds = 0
        while True:
            prompts = self.source.take(max(0, self.needed - len(kept)))
            new = self.draw(prompts, self.config.num_generations, self.sampling, clock, trainer_state)
            groups += new
            kept += [group for group in new if group.is_informative or not self.config.dynamic_sampling]
            rounds += 1
            missing = collectives.max_over_ranks([self.needed - len(kept)])[0]
            if missing <= 0 or rounds >= self.config.max_sampling_rounds:
                break
        samples = self._samples(kept or groups[:1])
        if not kept:  # this rank found nothing: it takes part in every forward, with rollouts that do not count
            for sample in samples:
                sample.tokens = 0
        return Filling(samples, groups, rounds, clock.seconds)

    def draw(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: Sampling,
        clock: Stopwatch | None = None,
        trainer_state: object = None,
    ) -> list[Group]:
        """Answer prompts and score the answers; every rank must call this equally often."""
        clock = clock or Stopwatch()
        with clock.stage("rollout"):
            drawn = self.engine.generate(prompts, num_generations, sampling)
        check_rollouts([rollout for rollouts in drawn for rollout in rollouts], sampling.suppress_token_ids)
        with clock.stage("reward"):
            scores = self.scorer.score(drawn, trainer_state)
        return [self._group(rollouts, own) for rollouts, own in zip(drawn, scores, strict=True)]

    def _group(self, rollouts: list[Rollout], scores: Scores) -> Group:
        informative = bool(informative_groups(reward_tensor([scores.total]))[0])
        if self.config.advantage == "hdpo":
            efficiency = reward_tensor([scores.components[self.config.efficiency_reward]])
            informative |= bool(efficiency_members(efficiency).any())
        return Group(rollouts, scores, informative)

    def _samples(self, groups: Sequence[Group]) -> list[Sample]:
        advantages, tool_advantages, members = self._advantages(groups)
        samples = []
        for number, group in enumerate(groups):
            for place, rollout in enumerate(group.rollouts):
                reward = group.scores.total[place]
                correct = group.scores.components[self.correct_name][place]
                leave_out = reward is None or (self.config.mask_truncated and not rollout.finished)
                samples.append(
                    Sample(
                        rollout=rollout,
                        group=number,
                        reward=reward,
                        rewards={name: values[place] for name, values in group.scores.components.items()},
                        advantage=float(advantages[number, place]),
                        tool_advantage=float(tool_advantages[number, place]),
                        is_tool_member=bool(members[number, place]),
                        is_correct=correct is not None and correct > 0.5,
                        tokens=0 if leave_out else rollout.policy_tokens,
                    )
                )
        return samples

    def _advantages(self, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Accuracy and efficiency advantages, and who takes part in the efficiency loss, (P, G) each."""
        total_PG = reward_tensor([group.scores.total for group in groups])
        if self.config.advantage == "grpo":
            nothing_PG = torch.zeros(total_PG.shape)
            return grpo_advantages(total_PG), nothing_PG, nothing_PG.bool()
        efficiency_PG = reward_tensor([group.scores.components[self.config.efficiency_reward] for group in groups])
        compat = self.config.hdpo_compat
        advantage_PG, tool_PG = hdpo_advantages(total_PG, efficiency_PG, compat=compat)  # type: ignore[arg-type]
        return advantage_PG, tool_PG, efficiency_members(efficiency_PG, compat=compat)  # type: ignore[arg-type]


def correct_reward_name(config: MetisRLConfig, names: Sequence[str]) -> str:
    """Which component says whether an answer is right.

    Raises:
        RecipeError: `correct_reward` names none of them.
    """
    if config.correct_reward is not None:
        if config.correct_reward not in names:
            raise RecipeError(f"correct_reward is {config.correct_reward!r}; the rewards are {', '.join(names)}")
        return config.correct_reward
    about_answers = [name for name in names if config.advantage != "hdpo" or name != config.efficiency_reward]
    return "accuracy_reward" if "accuracy_reward" in names else about_answers[0]
