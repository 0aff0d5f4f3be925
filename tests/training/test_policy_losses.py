"""Policy losses against closed forms, numbers computed token by token, and cuts into micro-batches."""

import math

import pytest
import torch
from torch import Tensor

from metis_home.errors import TrainingError
from metis_home.training.advantages import efficiency_members, hdpo_advantages
from metis_home.training.policy_losses import (
    AGGREGATIONS,
    Clipping,
    Surrogate,
    Totals,
    count_totals,
    importance_weights,
    k3,
    policy_loss,
    reference_hdpo_weights,
    sequence_weights,
)

LENGTHS = [3, 7, 1, 5, 2, 6]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def ragged(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, older ones near them, and the mask; padding holds NaN-free rubbish."""
    generator = torch.Generator().manual_seed(seed)
    logp_BT = -torch.rand(len(lengths), max(lengths), generator=generator).double() * 3
    old_BT = logp_BT + 0.4 * torch.randn(logp_BT.shape, generator=generator).double()
    mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).double()
    return logp_BT, old_BT, mask_BT


def one(advantage_B: Tensor, weight_B: Tensor | None = None) -> list[Surrogate]:
    weight_B = torch.ones_like(advantage_B) if weight_B is None else weight_B
    return [Surrogate(advantage_B=advantage_B, weight_B=weight_B)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_at_ratio_one_is_minus_weight_times_advantage(aggregation: str) -> None:
    logp_BT, _, mask_BT = ragged()
    logp_BT.requires_grad_()
    advantage_B = torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0, 0.3]).double()
    weight_B = sequence_weights(mask_BT.sum(1), aggregation, groups_R=GROUPS, max_completion_tokens=8)

    policy_loss(logp_BT, None, mask_BT, one(advantage_B, weight_B), Clipping()).loss.backward()

    torch.testing.assert_close(logp_BT.grad, -(weight_B * advantage_B)[:, None] * mask_BT, rtol=1e-12, atol=0)


def test_the_weights_of_each_aggregation_are_those_of_its_paper() -> None:
    tokens_R = torch.tensor(LENGTHS)

    def of(name: str) -> Tensor:
        return sequence_weights(tokens_R, name, groups_R=GROUPS, max_completion_tokens=8)

    assert of("token_mean").tolist() == [1 / 24] * 6
    assert of("sequence_mean").tolist() == pytest.approx([1 / (6 * n) for n in LENGTHS])
    assert of("dr_grpo").tolist() == [1 / 48] * 6
    assert of("dapo").tolist() == pytest.approx([1 / (2 * 11)] * 3 + [1 / (2 * 13)] * 3)
    with pytest.raises(TrainingError, match="token_mean"):
        of("mean")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rollouts_without_policy_tokens_count_for_nothing(aggregation: str) -> None:
    tokens_R, groups_R = torch.tensor([4, 0, 6]), torch.tensor([0, 0, 1])

    weight_R = sequence_weights(tokens_R, aggregation, groups_R=groups_R, max_completion_tokens=8)

    without_R = sequence_weights(tokens_R[[0, 2]], aggregation, groups_R=groups_R[[0, 2]], max_completion_tokens=8)
    assert weight_R[1] == 0
    assert weight_R[[0, 2]].tolist() == without_R.tolist()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_two_ranks_with_shared_totals_are_those_of_one(aggregation: str) -> None:
    tokens_R = torch.tensor(LENGTHS)
    parts = [count_totals(tokens_R[half], GROUPS[half]) for half in (slice(0, 3), slice(3, 6))]
    totals = Totals(
        tokens=sum(part.tokens for part in parts),
        rollouts=sum(part.rollouts for part in parts),
        groups=sum(part.groups for part in parts),
    )

    halves = [
        sequence_weights(tokens_R[half], aggregation, groups_R=GROUPS[half], max_completion_tokens=8, totals=totals)
        for half in (slice(0, 3), slice(3, 6))
    ]

    whole = sequence_weights(tokens_R, aggregation, groups_R=GROUPS, max_completion_tokens=8)
    assert torch.cat(halves).tolist() == whole.tolist()


def by_hand(logp: float, old: float, advantage: float, clipping: Clipping) -> float:
    ratio = math.exp(min(max(logp - old, -20), 20))
    clipped = min(max(ratio, 1 - clipping.low), 1 + clipping.high)
    cost = max(-advantage * ratio, -advantage * clipped)
    if advantage < 0 and clipping.dual is not None:
        cost = min(cost, -clipping.dual * advantage)
    return cost


@pytest.mark.parametrize("clipping", [Clipping(), Clipping(low=0.2, high=0.2), Clipping(dual=None)])
def test_the_loss_equals_a_sum_over_single_tokens(clipping: Clipping) -> None:
    logp_BT, old_BT, mask_BT = ragged(seed=1)
    old_BT[1, 2] = logp_BT[1, 2] - 2.5  # a ratio of 12, beyond the dual clip
    advantage_B = torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0, 0.3]).double()
    weight_B = torch.rand(6, generator=torch.Generator().manual_seed(2)).double()

    result = policy_loss(logp_BT, old_BT, mask_BT, one(advantage_B, weight_B), clipping)

    expected = sum(
        float(weight_B[b]) * by_hand(float(logp_BT[b, t]), float(old_BT[b, t]), float(advantage_B[b]), clipping)
        for b in range(6)
        for t in range(LENGTHS[b])
    )
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "has_gradient"),
    [
        (1.0, math.log(1.27), True),
        (1.0, math.log(1.29), False),  # clip-higher
        (1.0, math.log(0.5), True),  # a good token that became rarer is always pulled back
        (-1.0, math.log(0.81), True),
        (-1.0, math.log(0.79), False),
        (-1.0, math.log(2.9), True),  # a bad token that became likelier is always pushed down ...
        (-1.0, math.log(3.1), False),  # ... until the dual clip
    ],
)
def test_each_clip_stops_the_gradient_on_its_side_only(advantage: float, log_ratio: float, has_gradient: bool) -> None:
    logp_BT = torch.tensor([[-1.0]]).double().requires_grad_()
    old_BT = logp_BT.detach() - log_ratio

    result = policy_loss(logp_BT, old_BT, torch.ones(1, 1), one(torch.tensor([advantage]).double()), Clipping())
    result.loss.backward()

    assert (logp_BT.grad.item() != 0) == has_gradient
    if has_gradient:
        assert math.copysign(1, logp_BT.grad.item()) == -math.copysign(1, advantage)
    assert result.sums["clip_high"].item() == (advantage > 0 and not has_gradient)
    assert result.sums["clip_low"].item() == (advantage < 0 and log_ratio < 0 and not has_gradient)


def test_observation_tokens_have_no_gradient_and_no_influence() -> None:
    logp_BT, old_BT, mask_BT = ragged()
    mask_BT[1, 2:5] = 0  # what a tool wrote into the second rollout
    changed_BT = torch.where(mask_BT > 0, logp_BT, torch.tensor(float("nan")).double())
    advantage_B = torch.linspace(-1, 1, 6).double()

    for values_BT in (logp_BT, changed_BT):
        values_BT.requires_grad_()
        values_BT.grad = None
    arguments = {
        "importance_BT": torch.ones_like(mask_BT),
        "ref_logp_BT": old_BT,
        "kl_weight_B": torch.ones(6),
        "nll_weight_B": torch.ones(6),
    }
    losses = [
        policy_loss(values_BT, old_BT, mask_BT, one(advantage_B), Clipping(), **arguments).loss
        for values_BT in (logp_BT, changed_BT)
    ]
    losses[0].backward()
    losses[1].backward()

    assert losses[0].item() == losses[1].item()
    assert logp_BT.grad[mask_BT == 0].eq(0).all()
    assert logp_BT.grad[mask_BT > 0].ne(0).any()
    torch.testing.assert_close(changed_BT.grad[mask_BT > 0], logp_BT.grad[mask_BT > 0], rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cuts", [[1] * 6, [2, 4], [5, 1]])
def test_the_micro_batch_split_does_not_matter(aggregation: str, cuts: list[int]) -> None:
    logp_BT, old_BT, mask_BT = ragged(seed=4)
    advantage_B = torch.linspace(-1, 1, 6).double()
    weight_B = sequence_weights(mask_BT.sum(1), aggregation, groups_R=GROUPS, max_completion_tokens=8)

    def gradient(parts: list[int]) -> Tensor:
        values_BT = logp_BT.clone().requires_grad_()
        for rows in torch.arange(6).split(parts):
            surrogates = one(advantage_B[rows], weight_B[rows])
            policy_loss(values_BT[rows], old_BT[rows], mask_BT[rows], surrogates, Clipping()).loss.backward()
        return values_BT.grad

    torch.testing.assert_close(gradient(cuts), gradient([6]), rtol=1e-12, atol=1e-15)


def test_k3_is_zero_at_equality_and_its_mean_is_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    policy_V, reference_V = (torch.randn(6, generator=generator).double().log_softmax(0) for _ in range(2))
    exact = (policy_V.exp() * (policy_V - reference_V)).sum()

    expectation = (policy_V.exp() * k3(policy_V, reference_V)).sum()

    torch.testing.assert_close(expectation, exact, rtol=1e-12, atol=0)
    assert k3(policy_V, policy_V).eq(0).all()


def test_the_kl_term_pulls_towards_the_reference() -> None:
    logp_BT = torch.tensor([[-1.0, -1.0]]).double().requires_grad_()
    ref_BT = torch.tensor([[-2.0, -0.5]]).double()

    policy_loss(
        logp_BT,
        None,
        torch.ones(1, 2),
        one(torch.zeros(1).double()),
        Clipping(),
        ref_logp_BT=ref_BT,
        kl_weight_B=torch.tensor([0.1]),
    ).loss.backward()

    # d k3 / d logp = 1 - exp(ref - logp)
    torch.testing.assert_close(logp_BT.grad, 0.1 * (1 - (ref_BT - logp_BT.detach()).exp()), rtol=1e-6, atol=0)


def test_the_nll_term_is_the_mean_over_correct_tokens() -> None:
    logp_BT, _, mask_BT = ragged()
    correct_B = torch.tensor([1.0, 0, 0, 1, 0, 0]).double()
    tokens = float((mask_BT.sum(1) * correct_B).sum())

    result = policy_loss(
        logp_BT, None, mask_BT, one(torch.zeros(6).double()), Clipping(), nll_weight_B=0.1 * correct_B / tokens
    )

    expected = -0.1 * float((logp_BT * mask_BT)[[0, 3]].sum()) / tokens
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)


def test_importance_weights_are_capped_ratios_without_gradient() -> None:
    trainer_BT = torch.tensor([[-1.0, -1.0, -1.0]]).requires_grad_()
    sampler_BT = torch.tensor([[-1.0, -3.0, -0.5]])

    weight_BT = importance_weights(trainer_BT, sampler_BT, cap=2.0)

    torch.testing.assert_close(weight_BT, torch.tensor([[1.0, 2.0, math.exp(-0.5)]]))
    assert not weight_BT.requires_grad
    assert importance_weights(trainer_BT, sampler_BT, cap=None)[0, 1].item() == pytest.approx(math.exp(2))


def test_importance_scales_each_tokens_gradient() -> None:
    logp_BT = torch.zeros(1, 3).double().requires_grad_()
    weight_BT = torch.tensor([[0.5, 1.0, 2.0]]).double()

    policy_loss(
        logp_BT, None, torch.ones(1, 3), one(torch.ones(1).double()), Clipping(), importance_BT=weight_BT
    ).loss.backward()

    torch.testing.assert_close(logp_BT.grad, -weight_BT)


# ---- HDPO ----------------------------------------------------------------------------------------------------------


def hdpo_case() -> tuple[Tensor, Tensor]:
    """Accuracy and efficiency rewards of two prompts with three rollouts each."""
    accuracy_PG = torch.tensor([[1.0, 1.0, 0.1], [0.9, 1.0, 0.0]])
    efficiency_PG = torch.tensor([[1.0, 0.25, 0.0], [1 / 3, 0.5, 0.0]])
    return accuracy_PG, efficiency_PG


def test_hdpos_gradient_at_ratio_one_is_that_of_one_surrogate() -> None:
    logp_BT, _, mask_BT = ragged()
    logp_BT.requires_grad_()
    accuracy_PG, efficiency_PG = hdpo_case()
    a_acc, a_tool = (values.reshape(-1).double() for values in hdpo_advantages(accuracy_PG, efficiency_PG))
    member = efficiency_members(efficiency_PG).reshape(-1).double()
    n_all, n_q = mask_BT.sum(), (mask_BT.sum(1) * member).sum()
    surrogates = [
        Surrogate(advantage_B=a_acc, weight_B=torch.full((6,), 1.0).double() / n_all),
        Surrogate(advantage_B=a_tool, weight_B=0.15 * member / n_q),
    ]

    policy_loss(logp_BT, None, mask_BT, surrogates, Clipping(low=0.2, high=0.2)).loss.backward()

    combined_B = 1.0 * a_acc / n_all + 0.15 * a_tool * member / n_q
    torch.testing.assert_close(logp_BT.grad, -combined_B[:, None] * mask_BT, rtol=1e-10, atol=0)


def test_hdpos_reference_loss_equals_numbers_from_the_printed_formulas() -> None:
    """Golden: written with Python floats from L = w_acc S(A_acc, mask) + w_tool S(A_tool, mask_tool), per micro-batch."""
    logp_BT, old_BT, mask_BT = ragged(seed=5)
    a_acc, a_tool = (values.reshape(-1) for values in hdpo_advantages(*hdpo_case(), compat="reference"))
    clipping = Clipping(low=0.2, high=0.2, dual=3.0)

    def token_mean(advantages: Tensor, rows: list[int], chosen: list[int]) -> float:
        costs = [
            by_hand(float(logp_BT[b, t]), float(old_BT[b, t]), float(advantages[b]), clipping)
            for b in chosen
            for t in range(LENGTHS[b])
        ]
        return sum(costs) / len(costs) * len(rows) / 6

    expected = actual = 0.0
    for rows in ([0, 1], [2], [3, 4, 5]):
        members = [b for b in rows if float(a_tool[b]) != 0] or rows
        expected += 1.0 * token_mean(a_acc, rows, rows) + 0.15 * token_mean(a_tool, rows, members)
        weights = reference_hdpo_weights(mask_BT[rows], a_tool[rows], w_acc=1.0, w_tool=0.15, step_rollouts=6)
        surrogates = [
            Surrogate(advantage_B=advantages[rows], weight_B=weight_B)
            for advantages, weight_B in zip((a_acc, a_tool), weights, strict=True)
        ]
        actual += float(policy_loss(logp_BT[rows], old_BT[rows], mask_BT[rows], surrogates, clipping).loss)

    assert actual == pytest.approx(expected, rel=1e-9)


def test_the_reference_depends_on_the_packing_and_ours_does_not() -> None:
    logp_BT, old_BT, mask_BT = ragged(seed=5)
    accuracy_PG, efficiency_PG = hdpo_case()
    member = efficiency_members(efficiency_PG).reshape(-1).double()
    n_q = (mask_BT.sum(1) * member).sum()

    def total(parts: list[list[int]], compat: str | None) -> float:
        a_acc, a_tool = (v.reshape(-1).double() for v in hdpo_advantages(accuracy_PG, efficiency_PG, compat=compat))
        loss = 0.0
        for rows in parts:
            if compat:
                weights = reference_hdpo_weights(mask_BT[rows], a_tool[rows], w_acc=1.0, w_tool=0.15, step_rollouts=6)
            else:
                weights = (torch.full((len(rows),), 1 / mask_BT.sum()), 0.15 * member[rows] / n_q)
            surrogates = [
                Surrogate(advantage_B=a[rows], weight_B=w) for a, w in zip((a_acc, a_tool), weights, strict=True)
            ]
            loss += float(policy_loss(logp_BT[rows], old_BT[rows], mask_BT[rows], surrogates, Clipping()).loss)
        return loss

    whole, cut = [[0, 1, 2, 3, 4, 5]], [[0, 1], [2], [3, 4, 5]]
    assert total(whole, None) == pytest.approx(total(cut, None), rel=1e-9)
    assert abs(total(whole, "reference") - total(cut, "reference")) > 1e-3
