"""Optimizer steps from samples: normalisers, micro-batches, what is not computed."""

import pytest

from metis_home.training.rl.planning import plan_steps
from metis_home.training.rl.samples import Buffer, Sample
from metis_home.training.rollouts.types import Prompt, Rollout
from tests.training.rl.pico_rl import config


def sample(group: int, tokens: int, advantage: float = 1.0, *, prompt_tokens: int = 10, **fields) -> Sample:
    prompt = Prompt(index=group, id=str(group), input_ids=[1] * prompt_tokens, mm_token_type_ids=[0] * prompt_tokens)
    rollout = Rollout(
        prompt=prompt,
        completion_ids=[2] * tokens,
        logprobs=[-1.0] * tokens,
        loss_mask=[1] * tokens,
        branch=fields.pop("branch", None),
    )
    return Sample(rollout=rollout, group=group, reward=1.0, advantage=advantage, **{"tokens": tokens, **fields})


def rows_of(step) -> list:
    return [row for batch in step.micro_batches for row in batch]


def plan(samples, tmp_path, *, trains_router: bool = False, trains_tokens: bool = True, **fields):
    return plan_steps(samples, config(tmp_path, **fields), trains_router=trains_router, trains_tokens=trains_tokens)


def test_a_prompts_rollouts_stay_in_one_step_and_every_prompt_is_used_once(tmp_path) -> None:
    samples = [sample(group, 3 + group) for group in range(5) for _ in range(4)]

    steps = plan(samples, tmp_path, updates_per_rollout=2)

    used = [{samples[row.sample].group for row in rows_of(step)} for step in steps]
    assert used == [{0, 1}, {2, 3, 4}]
    assert sum(len(rows_of(step)) for step in steps) == 20


def test_weights_are_normalised_within_each_step(tmp_path) -> None:
    samples = [sample(group, 3 + group) for group in range(4) for _ in range(2)]

    for step in plan(samples, tmp_path, updates_per_rollout=2):
        assert sum(row.weight * samples[row.sample].tokens for row in rows_of(step)) == pytest.approx(1.0)


def test_hdpos_efficiency_loss_has_its_own_denominator(tmp_path) -> None:
    samples = [
        sample(0, 4, tool_advantage=0.7, is_tool_member=True),
        sample(0, 6, tool_advantage=-0.7, is_tool_member=True),
        sample(0, 100),
    ]

    [step] = plan(samples, tmp_path, advantage="hdpo", w_acc=1.0, w_tool=0.15)

    by_sample = {row.sample: row for row in rows_of(step)}
    assert by_sample[0].tool_weight == pytest.approx(0.15 / 10)
    assert by_sample[2].tool_weight == 0
    assert by_sample[2].weight == pytest.approx(1 / 110)


def test_the_reference_normalises_inside_micro_batches(tmp_path) -> None:
    samples = [
        sample(0, 4, tool_advantage=0.7, is_tool_member=True),
        sample(0, 6, tool_advantage=-0.7, is_tool_member=True),
        sample(0, 100, advantage=0.0),
    ]

    [step] = plan(samples, tmp_path, advantage="hdpo", hdpo_compat="reference", per_device_train_batch_size=2)

    first, second = step.micro_batches  # longest first: 100 and 6 tokens, then 4
    assert [row.sample for row in first] == [2, 1]
    assert first[0].weight == pytest.approx((2 / 3) / 106)
    assert [row.tool_weight for row in first] == pytest.approx([0.0, 0.15 * (2 / 3) / 6])
    assert second[0].tool_weight == pytest.approx(0.15 * (1 / 3) / 4)


def test_micro_batches_keep_the_budget_and_hold_one_branch(tmp_path) -> None:
    samples = [sample(n, 5 + 7 * n, branch=n % 2) for n in range(12)]

    [step] = plan(samples, tmp_path, thinking="sample", micro_batch_tokens=150, per_device_train_batch_size=3)

    assert sorted(row.sample for row in rows_of(step)) == list(range(12))
    for batch in step.micro_batches:
        rollouts = [samples[row.sample].rollout for row in batch]
        assert len(batch) == 1 or len(batch) * max(map(len, rollouts)) <= 150
        assert len(batch) <= 3
        assert len({rollout.branch for rollout in rollouts}) == 1


def test_rollouts_without_any_coefficient_are_not_computed(tmp_path) -> None:
    samples = [
        sample(0, 3, advantage=0.0),
        sample(0, 3),
        sample(0, 0, advantage=0.0),
        sample(0, 3, advantage=0.0, is_correct=True),
    ]

    def computed(**fields) -> list[int]:
        return sorted(row.sample for step in plan(samples, tmp_path, **fields) for row in rows_of(step))

    assert computed() == [1]
    assert computed(nll_coef=0.1) == [1, 3]
    assert computed(kl_coef=0.1) == [0, 1, 3]
    assert computed(skip_idle_rollouts=False) == [0, 1, 2, 3]


def test_no_signal_at_all_means_no_micro_batch(tmp_path) -> None:
    [step] = plan([sample(0, 3, advantage=0.0)], tmp_path)

    assert step.micro_batches == []


def test_each_decision_of_the_router_weighs_alike(tmp_path) -> None:
    samples = [sample(0, 3, branch=0), sample(0, 30, branch=1)]

    [step] = plan(samples, tmp_path, trains_router=True, trains_tokens=False, thinking="sample", router_coef=2.0)

    assert [row.router_weight for row in rows_of(step)] == [1.0, 1.0]
    assert [row.weight for row in rows_of(step)] == [0.0, 0.0]


def test_a_buffer_survives_its_own_state(tmp_path) -> None:
    samples = [sample(group, 3, old_logprobs=[-1.0, -2.0, -3.0]) for group in range(2) for _ in range(2)]
    buffer = Buffer(samples, plan(samples, tmp_path, updates_per_rollout=2))
    buffer.pop()
    prompts = {sample.rollout.prompt.index: sample.rollout.prompt for sample in samples}

    again = Buffer.from_state(buffer.state_dict(), prompts.__getitem__)

    assert again.samples == samples
    assert again.steps == buffer.steps
    assert again.next_step == 1
    assert again.samples[0].rollout.prompt is again.samples[1].rollout.prompt
