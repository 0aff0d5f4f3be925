"""From rollouts with advantages to optimizer steps: whose tokens weigh how much, and which rollouts share a forward.

All normalisers of all steps of a filling are computed here, once, over all ranks.
"""

from collections.abc import Sequence

import torch

from .. import collectives
from ..data.batching import batches_by_length
from ..policy_losses import Totals, count_totals, reference_hdpo_weights, sequence_weights
from .config import MetisRLConfig
from .samples import MicroBatch, Row, Sample, StepPlan


def plan_steps(
    samples: Sequence[Sample], config: MetisRLConfig, *, trains_router: bool, trains_tokens: bool = True
) -> list[StepPlan]:
    """Split the prompts of a filling into `updates_per_rollout` optimizer steps, repeated `passes_per_rollout` times.

    Args:
        samples: of this rank; a prompt's rollouts stay in one step.
        trains_router: the router's decisions have a loss. trains_tokens: the tokens have.
    Returns:
        The steps, with equally many micro-batches on every rank (0 where no rank has anything to learn from).
    """
    groups = list(dict.fromkeys(sample.group for sample in samples))
    plans = []
    for number in range(config.updates_per_rollout):
        start = number * len(groups) // config.updates_per_rollout
        end = (number + 1) * len(groups) // config.updates_per_rollout
        mine = set(groups[start:end])
        chosen = [index for index, sample in enumerate(samples) if sample.group in mine]
        rows = weigh(samples, chosen, config, trains_router=trains_router, trains_tokens=trains_tokens)
        plans.append(_micro_batches(samples, rows, config))
    return [StepPlan(micro_batches) for _ in range(config.passes_per_rollout) for micro_batches in plans]


def weigh(
    samples: Sequence[Sample], chosen: Sequence[int], config: MetisRLConfig, *, trains_router: bool, trains_tokens: bool
) -> list[Row]:
    """The weights of one optimizer step's samples, normalised over all ranks."""
    tokens_R = torch.tensor([samples[index].tokens for index in chosen], dtype=torch.float64)
    groups_R = torch.tensor([samples[index].group for index in chosen], dtype=torch.long)
    member_R = torch.tensor([samples[index].is_tool_member for index in chosen], dtype=torch.float64)
    correct_R = torch.tensor([samples[index].is_correct for index in chosen], dtype=torch.float64)
    present_R = (tokens_R > 0).double()

    everyone, members = count_totals(tokens_R, groups_R), count_totals(tokens_R * member_R, groups_R)
    correct_tokens = float((tokens_R * correct_R).sum())
    sums = collectives.sum_over_ranks([*_values(everyone), *_values(members), correct_tokens])
    everyone, members = _totals(sums[0:3]), _totals(sums[3:6])

    def weights(own_R: torch.Tensor, totals: Totals) -> torch.Tensor:
        return sequence_weights(
            own_R,
            config.loss_aggregation,  # type: ignore[arg-type]
            groups_R=groups_R,
            max_completion_tokens=config.max_completion_tokens,
            totals=totals,
        )

    is_hdpo = config.advantage == "hdpo"
    plain_R = weights(tokens_R, everyone) * float(trains_tokens)
    tool_R = weights(tokens_R * member_R, members) * float(trains_tokens) if is_hdpo else torch.zeros_like(tokens_R)
    nll_R = correct_R * present_R * float(trains_tokens) / max(sums[6], 1.0)
    router_R = present_R * (config.router_coef if trains_router else 0.0) / max(everyone.rollouts, 1.0)
    columns = (
        plain_R * (config.w_acc if is_hdpo else 1.0),
        tool_R * config.w_tool,
        nll_R * config.nll_coef,
        plain_R * config.kl_coef,
        router_R,
    )
    return [
        Row(index, *values) for index, *values in zip(chosen, *(column.tolist() for column in columns), strict=True)
    ]


def _micro_batches(samples: Sequence[Sample], rows: list[Row], config: MetisRLConfig) -> list[MicroBatch]:
    """Rows of one branch and of similar length together, within the token budget; padded to equal counts on ranks."""
    is_reference = config.advantage == "hdpo" and config.hdpo_compat == "reference"
    active = [row for row in rows if is_reference or not config.skip_idle_rollouts or not is_idle(row, samples, config)]
    batches: list[MicroBatch] = []
    for branch in sorted({samples[row.sample].rollout.branch for row in active}, key=lambda value: value or 0):
        own = [row for row in active if samples[row.sample].rollout.branch == branch]
        lengths = [len(samples[row.sample].rollout) for row in own]
        cuts = batches_by_length(
            lengths, max_tokens=config.micro_batch_tokens, max_rows=config.per_device_train_batch_size
        )
        batches += [[own[number] for number in cut] for cut in cuts]
    if is_reference:
        batches = [_reference(samples, batch, config, len(rows)) for batch in batches]
    wanted = int(collectives.max_over_ranks([len(batches)])[0])
    if len(batches) < wanted:  # every rank runs equally many forwards and backwards
        shortest = min(range(len(samples)), key=lambda index: (len(samples[index].rollout), index))
        batches += [[Row(shortest)]] * (wanted - len(batches))
    return batches


def decision_advantage(sample: Sample, config: MetisRLConfig) -> float:
    """What the router's decision for this rollout was worth: both advantages as the tokens' loss weighs them."""
    if config.advantage == "hdpo":
        return config.w_acc * sample.advantage + config.w_tool * sample.tool_advantage
    return sample.advantage


def is_idle(row: Row, samples: Sequence[Sample], config: MetisRLConfig) -> bool:
    """Is every gradient of this row 0?"""
    sample = samples[row.sample]
    terms = (
        row.weight * sample.advantage,
        row.tool_weight * sample.tool_advantage,
        row.router_weight * decision_advantage(sample, config),
        row.nll_weight,
        row.kl_weight,
    )
    return all(term == 0 for term in terms)


def _reference(samples: Sequence[Sample], batch: MicroBatch, config: MetisRLConfig, step_rollouts: int) -> MicroBatch:
    """HDPO's released normalisers, which the mean over ranks of the gradients does not touch."""
    tokens_B1 = torch.tensor([[float(samples[row.sample].tokens)] for row in batch])
    tool_B = torch.tensor([samples[row.sample].tool_advantage for row in batch])
    weights = reference_hdpo_weights(
        tokens_B1, tool_B, w_acc=config.w_acc, w_tool=config.w_tool, step_rollouts=step_rollouts
    )
    ranks = collectives.world_size()
    acc_B, tool_weight_B = ((weight_B / ranks).tolist() for weight_B in weights)
    return [
        row._replace(weight=acc, tool_weight=tool) for row, acc, tool in zip(batch, acc_B, tool_weight_B, strict=True)
    ]


def _values(totals: Totals) -> tuple[float, float, float]:
    return totals.tokens, totals.rollouts, totals.groups


def _totals(values: Sequence[float]) -> Totals:
    return Totals(tokens=values[0], rollouts=values[1], groups=values[2])
