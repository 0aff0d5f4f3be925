"""Advantages against hand-computed groups, ties that rounding would break, and what the released HDPO code computes."""

import math

import pytest
import torch

from metis_home.errors import RewardError
from metis_home.training.advantages import (
    efficiency_members,
    grpo_advantages,
    hdpo_advantages,
    informative_groups,
    reward_tensor,
)

NAN = float("nan")


def test_a_hand_computed_group() -> None:
    # rewards 1, 0, 0, 1: mean 0.5, unbiased variance 4 * 0.25 / 3 = 1/3
    reward_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0]])

    advantage_PG = grpo_advantages(reward_PG)

    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    torch.testing.assert_close(advantage_PG, expected * torch.tensor([[1.0, -1.0, -1.0, 1.0]]), rtol=1e-6, atol=0)
    assert advantage_PG.dtype == torch.float32


def test_groups_do_not_touch_each_other() -> None:
    reward_PG = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))

    together_PG = grpo_advantages(reward_PG)

    for p in range(5):
        torch.testing.assert_close(together_PG[p : p + 1], grpo_advantages(reward_PG[p : p + 1]), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.1, 0.9, 1 / 3, 0.3 + 0.6, -7.7, 0.0])
@pytest.mark.parametrize("rollouts", range(1, 17))
def test_equal_rewards_give_exact_zeros(value: float, rollouts: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert grpo_advantages(torch.full((2, rollouts), value, dtype=dtype)).eq(0).all()


def test_rewards_that_differ_by_rounding_are_ties() -> None:
    # 0.9 * 1 + 0.1 * 0 against 1 - 0.1, summed in other orders
    reward_PG = torch.tensor([[0.9, 1 - 0.1, 0.3 + 0.3 + 0.3, 0.9]], dtype=torch.float64).float()
    reward_PG[0, 2] = torch.nextafter(torch.tensor(0.9), torch.tensor(1.0))

    assert grpo_advantages(reward_PG).eq(0).all()
    assert not informative_groups(reward_PG).any()


def test_a_rollout_that_was_not_scored_moves_nobody_and_gets_nothing() -> None:
    with_gap_PG = reward_tensor([[1.0, None, 0.0, 0.0]])

    advantage_PG = grpo_advantages(with_gap_PG)

    without_PG = grpo_advantages(torch.tensor([[1.0, 0.0, 0.0]]))
    assert advantage_PG[0, 1] == 0
    torch.testing.assert_close(advantage_PG[:, [0, 2, 3]], without_PG, rtol=0, atol=0)


def test_groups_without_any_score_are_zero_and_teach_nothing() -> None:
    reward_PG = reward_tensor([[None, None], [None, 1.0], [0.0, 1.0]])

    assert grpo_advantages(reward_PG)[:2].eq(0).all()
    assert informative_groups(reward_PG).tolist() == [False, False, True]


def test_infinite_or_misshapen_rewards_are_refused() -> None:
    with pytest.raises(RewardError, match="infinite"):
        grpo_advantages(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(RewardError, match="shape"):
        grpo_advantages(torch.zeros(4))
    with pytest.raises(RewardError, match="compat"):
        hdpo_advantages(torch.zeros(1, 2), torch.zeros(1, 2), compat="other")
    with pytest.raises(RewardError, match="one of each"):
        hdpo_advantages(torch.zeros(1, 2), torch.zeros(1, 3))


def test_efficiency_is_compared_among_the_correct_rollouts_only() -> None:
    # T = 0, 1, 3 tool turns for three correct rollouts: 1, 1/2, 1/4; mean 7/12
    efficiency_PG = torch.tensor([[1.0, 0.0, 0.5, 0.25]], dtype=torch.float64)
    accuracy_PG = torch.tensor([[1.0, 0.0, 1.0, 1.0]])

    accuracy_advantage_PG, tool_advantage_PG = hdpo_advantages(accuracy_PG, efficiency_PG)

    mean = 7 / 12
    std = math.sqrt(((1 - mean) ** 2 + (0.5 - mean) ** 2 + (0.25 - mean) ** 2) / 2)
    expected = [(1 - mean) / (std + 1e-6), 0.0, (0.5 - mean) / (std + 1e-6), (0.25 - mean) / (std + 1e-6)]
    torch.testing.assert_close(tool_advantage_PG[0], torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(accuracy_advantage_PG, grpo_advantages(accuracy_PG), rtol=0, atol=0)
    assert efficiency_members(efficiency_PG).tolist() == [[True, False, True, True]]


@pytest.mark.parametrize(
    "efficiency",
    [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [NAN, 0.5, 0.0]],
    ids=["no correct one", "one correct", "two alike", "one not scored"],
)
def test_efficiency_says_nothing_without_two_different_correct_rollouts(efficiency: list[float]) -> None:
    efficiency_PG = torch.tensor([efficiency])

    assert hdpo_advantages(torch.zeros(1, 3), efficiency_PG)[1].eq(0).all()
    assert not efficiency_members(efficiency_PG).any()


def test_two_different_correct_rollouts_are_plus_and_minus_one_over_root_two() -> None:
    _, advantage_PG = hdpo_advantages(torch.zeros(1, 3), torch.tensor([[1.0, 0.5, 0.0]]))

    torch.testing.assert_close(advantage_PG, torch.tensor([[0.5**0.5, -(0.5**0.5), 0.0]]), rtol=1e-5, atol=0)


def test_a_member_on_the_mean_is_still_a_member() -> None:
    efficiency_PG = torch.tensor([[1.0, 0.75, 0.5]])

    assert hdpo_advantages(torch.zeros(1, 3), efficiency_PG)[1][0, 1] == 0
    assert efficiency_members(efficiency_PG).all()
    assert efficiency_members(efficiency_PG, compat="reference").tolist() == [[True, False, True]]


def test_ties_of_seven_at_two_tool_turns_are_noise_in_the_reference_and_nothing_in_ours() -> None:
    efficiency_PG = torch.full((1, 7), 1 / 3)

    reference = hdpo_advantages(torch.zeros(1, 7), efficiency_PG, compat="reference")[1]
    ours = hdpo_advantages(torch.zeros(1, 7), efficiency_PG)[1]

    assert reference.abs().max() == pytest.approx(0.029, abs=0.001)  # the value measured with the released formulas
    assert ours.eq(0).all()
    assert efficiency_members(efficiency_PG, compat="reference").all()
    assert not efficiency_members(efficiency_PG).any()


def test_sixteen_equal_accuracies_are_noise_in_the_reference() -> None:
    for value, noise in ((0.9, -0.056), (0.1, -0.007)):
        reward_PG = torch.full((1, 16), value)

        advantage_PG, _ = hdpo_advantages(reward_PG, torch.zeros(1, 16), compat="reference")

        assert advantage_PG[0, 0].item() == pytest.approx(noise, abs=0.001)
        assert hdpo_advantages(reward_PG, torch.zeros(1, 16))[0].eq(0).all()


def test_compat_is_the_released_formula_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    for size in (2, 3, 5, 7, 8, 16):
        correct_PG = torch.rand(20, size, generator=generator) < 0.6
        turns_PG = torch.randint(0, 11, (20, size), generator=generator)
        format_PG = (torch.rand(20, size, generator=generator) < 0.8).float()
        accuracy_PG = 0.9 * correct_PG.float() + 0.1 * format_PG
        efficiency_PG = torch.where(correct_PG, 1 / (turns_PG + 1).float(), 0.0)

        advantage_PG, tool_PG = hdpo_advantages(accuracy_PG, efficiency_PG, compat="reference")

        for p in range(20):  # written from the formulas: one list per prompt, scores stacked in order
            scores = list(accuracy_PG[p])
            mean, std = torch.mean(torch.stack(scores)), torch.std(torch.stack(scores))
            assert torch.equal(advantage_PG[p], torch.stack([(score - mean) / (std + 1e-6) for score in scores]))
            qualified = [score for score in efficiency_PG[p] if score > 0]
            for g, score in enumerate(efficiency_PG[p]):
                if score > 0 and len(qualified) >= 2:
                    stacked = torch.stack(qualified)
                    want = (score - torch.mean(stacked)) / (torch.std(stacked) + 1e-6)
                else:
                    want = torch.tensor(0.0)
                assert torch.equal(tool_PG[p, g], want)


def test_a_group_of_one_keeps_its_reward_in_the_reference_and_teaches_nothing_in_ours() -> None:
    reference, _ = hdpo_advantages(torch.tensor([[0.9]]), torch.tensor([[1.0]]), compat="reference")

    assert reference.item() == pytest.approx(0.9, rel=1e-5)
    assert grpo_advantages(torch.tensor([[0.9]])).item() == 0


def test_a_failed_judge_counts_as_wrong_in_the_reference() -> None:
    reward_PG = torch.tensor([[1.0, NAN, 1.0]])

    reference, _ = hdpo_advantages(reward_PG, torch.zeros(1, 3), compat="reference")
    ours, _ = hdpo_advantages(reward_PG, torch.zeros(1, 3))

    assert reference[0, 1] < -1
    assert ours.eq(0).all()
