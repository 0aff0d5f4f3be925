"""Held-out prompts, answered and scored between the steps: the number that says whether the training works."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from .. import collectives
from ..data.encode import Encoder
from ..data.records import Record
from ..rollouts.engine import RolloutEngine
from ..rollouts.types import Sampling, make_prompt
from .config import MetisRLConfig
from .metrics import filling_columns, filling_metrics
from .prompts import PromptSource
from .rl_buffer import BufferFiller, Filling, Group

# What only says something about training.
_NOT_REPORTED = ("groups/", "advantage/", "seconds/", "pass_rate/", "reward_std", "rollout_tokens_per_second")


def validate(
    records: Sequence[Record],
    encoder: Encoder,
    filler: BufferFiller,
    engine: RolloutEngine,
    config: MetisRLConfig,
    *,
    prefix: str,
    enter: Callable[[str], None],
) -> dict[str, float]:
    """Answer the records, each rank its share, and return what training logs of its rollouts, over all ranks.

    `eval_num_generations` 1: one greedy answer, by the branch that the router prefers where it decides. More: sampled as
    in training; `accuracy` is then pass@1 and `pass@k` the share of prompts with at least one right answer. The
    engine's random numbers begin alike each time and are put back, so that validation changes no training.

    Args:
        encoder: prompts above its `max_length` are left out, with a warning.
        enter: called with what is done next, for a watchdog.
    Raises:
        DataError: no record is short enough.
    """
    start, state = time.perf_counter(), engine.state_dict()
    engine.seed(config.seed)
    own = PromptSource(records, encoder, seed=config.seed).usable[collectives.rank() :: collectives.world_size()]
    rounds = int(collectives.max_over_ranks([-(-len(own) // filler.needed)])[0])
    groups: list[Group] = []
    for number in range(rounds):
        enter(f"validation, part {number + 1} of {rounds}")
        chosen = own[number * filler.needed : (number + 1) * filler.needed]
        prompts = [make_prompt(records[index], encoder, index=index) for index in chosen]
        groups += filler.draw(prompts, config.eval_num_generations, validation_sampling(filler.sampling, config))
    engine.load_state_dict(state)
    filling = Filling([], groups, rounds)
    metrics = filling_metrics(filling, filler.scorer.names, filler.correct_name, drawn=False) | filling_columns(filling)
    found = {name: value for name, value in metrics.items() if not name.startswith(_NOT_REPORTED)}
    if config.eval_num_generations > 1:
        found[f"pass@{config.eval_num_generations}"] = metrics["pass_rate/some"] + metrics["pass_rate/all"]
    found["runtime"] = time.perf_counter() - start
    return {f"{prefix}_{name}": value for name, value in found.items()}


def validation_sampling(sampling: Sampling, config: MetisRLConfig) -> Sampling:
    """Greedy for one answer, else as in training; where training draws the branch, the router's preference."""
    branch = "router" if sampling.branch == "sample" else sampling.branch
    temperature = 0.0 if config.eval_num_generations == 1 else sampling.temperature
    return replace(sampling, temperature=temperature, branch=branch)
