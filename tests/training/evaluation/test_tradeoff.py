"""Thresholds by exact arithmetic: every outcome is there, and the picked one is the best of all thresholds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_home.errors import DataError
from metis_home.router import decide
from metis_home.training.evaluation.tradeoff import Outcome, Query, Target, at_threshold, pick, trade_off


def query(probability: float, tokens: tuple[int, int] = (1, 10), correct=(False, True)) -> Query:
    return Query(thinking_probability=probability, tokens=tokens, correct=correct)


# Direct answers cost 2 tokens and thinking 12; thinking helps the last two, and spoils the first.
FOUR = [
    query(0.2, (2, 12), (True, False)),
    query(0.4, (2, 12), (True, True)),
    query(0.6, (2, 12), (False, True)),
    query(0.8, (2, 12), (False, True)),
]


def test_the_curve_by_hand() -> None:
    found = trade_off(FOUR)

    assert [round(outcome.threshold, 6) for outcome in found] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert [outcome.thinking_ratio for outcome in found] == [1, 0.75, 0.5, 0.25, 0]
    assert [outcome.mean_tokens for outcome in found] == [12, 9.5, 7, 4.5, 2]
    assert [outcome.accuracy for outcome in found] == [0.75, 1, 1, 0.75, 0.5]


@pytest.mark.parametrize(
    ("kind", "value", "ratio"),
    [
        ("thinking_ratio", 0.25, 0.25),
        ("thinking_ratio", 0.3, 0.25),
        ("thinking_ratio", 0.375, 0.5),  # as near to 1/4 as to 1/2: the more accurate one
        ("thinking_ratio", 0.625, 0.5),  # as near, as accurate: the one with fewer tokens
        ("mean_tokens", 12, 0.5),  # accuracy 1 at 9.5 and at 7 tokens: the cheaper
        ("mean_tokens", 6.9, 0.25),
        ("mean_tokens", 2, 0),
        ("accuracy", 1.0, 0.5),
        ("accuracy", 0.75, 0.25),
        ("accuracy", 0.0, 0),
    ],
)
def test_the_pick_by_hand(kind: str, value: float, ratio: float) -> None:
    assert pick(trade_off(FOUR), Target(kind=kind, value=value)).thinking_ratio == ratio


def test_equal_probabilities_think_together_or_not_at_all() -> None:
    found = trade_off([query(0.5), query(0.5), query(0.5), query(0.9)])

    assert [outcome.thinking for outcome in found] == [4, 1, 0]


def test_a_query_that_surely_thinks_cannot_be_stopped() -> None:
    found = trade_off([query(0.5), query(1.0)])

    assert [outcome.thinking for outcome in found] == [2, 1]
    with pytest.raises(DataError, match=r"thinking ratio of 0: .* between 0.5 and 1"):
        pick(found, Target(kind="thinking_ratio", value=0))


def test_a_query_that_surely_does_not_think_still_does_at_threshold_zero() -> None:
    assert [(outcome.threshold, outcome.thinking) for outcome in trade_off([query(0.0)])] == [(0.0, 1), (0.5, 0)]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("mean_tokens", 1.9, "between 2 and 12"),
        ("accuracy", 1.0, "between 0.4000 and 0.8000"),
    ],
)
def test_an_unreachable_target_names_what_can_be_reached(kind: str, value: float, message: str) -> None:
    never_right = [*FOUR, query(0.9, (2, 12), (False, False))]

    with pytest.raises(DataError, match=message):
        pick(trade_off(never_right), Target(kind=kind, value=value))


def test_only_queries_with_two_verdicts_count_for_accuracy() -> None:
    found = trade_off([query(0.3, correct=(True, None)), query(0.7, correct=(False, True))])

    assert [outcome.accuracy for outcome in found] == [1, 1, 0]
    assert [outcome.mean_tokens for outcome in found] == [10, 5.5, 1]  # tokens count everywhere


def test_without_verdicts_only_a_thinking_ratio_can_be_asked_for() -> None:
    found = trade_off([query(0.3, correct=(None, None)), query(0.7, correct=(None, None))])

    assert pick(found, Target(kind="thinking_ratio", value=0.5)).accuracy is None
    for kind in ("mean_tokens", "accuracy"):
        with pytest.raises(DataError, match="needs verdicts"):
            pick(found, Target(kind=kind, value=0.5))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_impossible_target_is_refused(value: float) -> None:
    with pytest.raises(DataError, match="must lie in"):
        Target(kind="accuracy", value=value)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(DataError, match="P\\(thinking\\)"):
        trade_off([query(probability)])
    with pytest.raises(DataError, match="at least one"):
        trade_off([])


# ---- properties -----------------------------------------------------------------------------------------------------

# Ties and neighbouring float32 numbers on purpose: midpoints between neighbours cannot be represented.
CLOSE = [float(np.nextafter(np.float32(0.5), np.float32(side))) for side in (0, 1)]
probabilities = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, *CLOSE]), st.floats(0, 1, width=32))
verdicts = st.sampled_from([None, True, False])
queries_of = st.lists(
    st.builds(
        query,
        probabilities,
        st.tuples(st.integers(1, 5), st.integers(1, 9)),
        st.tuples(verdicts, verdicts),
    ),
    min_size=1,
    max_size=12,
)


def without_threshold(outcome: Outcome) -> tuple:
    return outcome.thinking, outcome.thinking_ratio, outcome.mean_tokens, outcome.accuracy


def all_thresholds(queries: list[Query]) -> list[float]:
    """One threshold in, and one at both ends of, every gap between probabilities: all that can differ."""
    found = {0.0, 1.0}
    for item in queries:
        value = np.float32(item.thinking_probability)
        found |= {float(value), float(np.nextafter(value, np.float32(2))), float(np.nextafter(value, np.float32(-1)))}
    return sorted(value for value in found if 0 <= value <= 1)


@settings(deadline=None)
@given(queries_of)
def test_the_curve_holds_exactly_what_thresholds_can_do(queries: list[Query]) -> None:
    curve = trade_off(queries)

    assert {without_threshold(outcome) for outcome in curve} == {
        without_threshold(at_threshold(queries, threshold)) for threshold in all_thresholds(queries)
    }
    for outcome in curve:
        assert at_threshold(queries, outcome.threshold) == outcome


@settings(deadline=None)
@given(queries_of, st.sampled_from(["thinking_ratio", "mean_tokens", "accuracy"]), st.floats(0, 1), st.floats(1, 9))
def test_the_pick_meets_the_target_and_no_threshold_does_better(
    queries: list[Query], kind: str, share: float, tokens: float
) -> None:
    value = tokens if kind == "mean_tokens" else share
    everything = [at_threshold(queries, threshold) for threshold in all_thresholds(queries)]
    scored = everything[0].accuracy is not None

    try:
        best = pick(trade_off(queries), Target(kind=kind, value=value))
    except DataError:
        if kind == "thinking_ratio":  # only queries with P(thinking) = 1 put a ratio out of reach
            assert min(found.thinking_ratio for found in everything) > value
        elif scored:
            met = "mean_tokens" if kind == "mean_tokens" else "accuracy"
            values = [getattr(found, met) for found in everything]
            assert min(values) > value if kind == "mean_tokens" else max(values) < value
        return

    assert without_threshold(at_threshold(queries, best.threshold)) == without_threshold(best)
    if kind == "thinking_ratio":
        nearest = min(abs(found.thinking_ratio - value) for found in everything)
        assert abs(best.thinking_ratio - value) == nearest
    elif kind == "mean_tokens":
        assert best.mean_tokens <= value
        rivals = [found for found in everything if found.mean_tokens <= value]
        assert all((found.accuracy, -found.mean_tokens) <= (best.accuracy, -best.mean_tokens) for found in rivals)
    else:
        assert best.accuracy >= value
        rivals = [found for found in everything if found.accuracy >= value]
        assert all((-found.mean_tokens, found.accuracy) <= (-best.mean_tokens, best.accuracy) for found in rivals)


@settings(deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12))
def test_the_router_itself_decides_as_the_curve_says(logits: list[float]) -> None:
    logits_BE = torch.tensor([[0.0, logit] for logit in logits])
    probability_B = decide(logits_BE).thinking_probability

    for outcome in trade_off([query(value) for value in probability_B.tolist()]):
        assert int(decide(logits_BE, outcome.threshold).branch_ids.sum()) == outcome.thinking
