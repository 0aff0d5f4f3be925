"""The numbers of an evaluation: hand-computed, and against scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_home.errors import DataError
from metis_home.training.evaluation.metrics import (
    confusion,
    mean,
    paired_difference,
    proportion,
    reliability,
    roc_auc,
    share_seconds,
)

# ---- proportion -----------------------------------------------------------------------------------------------------


def test_a_share_comes_with_its_wilson_interval() -> None:
    # By hand for 8 of 10: centre (0.8 + 0.19207) / 1.38415, half 1.95996 sqrt(0.016 + 0.009604) / 1.38415.
    found = proportion(8, 10)

    assert found.value == 0.8
    assert found.low == pytest.approx(0.49016, abs=1e-5)
    assert found.high == pytest.approx(0.94332, abs=1e-5)


def test_the_interval_of_none_and_of_all_ends_at_the_border() -> None:
    none, everything = proportion(0, 10), proportion(10, 10)

    # With 0 hits the upper end is z^2 / (n + z^2).
    assert (none.low, none.high) == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))
    assert (everything.low, everything.high) == (pytest.approx(10 / 13.841459, abs=1e-6), 1.0)


def test_a_share_of_nothing_is_unknown_and_not_zero() -> None:
    assert proportion(0, 0).value is None
    assert proportion(0, 0).low is None


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3)])
def test_an_impossible_share_is_refused(hits: int, total: int) -> None:
    with pytest.raises(DataError, match="0 <= hits <= total"):
        proportion(hits, total)


@settings(deadline=None)
@given(total=st.integers(1, 10_000), data=st.data())
def test_the_interval_holds_the_share_and_stays_in_range(total: int, data: st.DataObject) -> None:
    found = proportion(data.draw(st.integers(0, total)), total)

    assert 0 <= found.low <= found.value <= found.high <= 1


def test_95_percent_of_the_intervals_hold_the_true_share() -> None:
    hits = np.random.default_rng(0).binomial(60, 0.9, size=2000)

    covered = np.mean([found.low <= 0.9 <= found.high for found in (proportion(int(hit), 60) for hit in hits)])

    assert 0.93 < covered < 0.98  # Wilson's coverage at n = 60, p = 0.9 is 0.957; the standard error is 0.005


# ---- paired difference ----------------------------------------------------------------------------------------------


def test_the_difference_is_taken_query_by_query() -> None:
    found = paired_difference([3.0, 2.0, 1.0], [1.0, 0.0, -1.0])

    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)  # every query differs by 2: nothing to doubt


def test_the_interval_shrinks_like_the_standard_error() -> None:
    delta = np.random.default_rng(1).normal(0.5, 1.0, size=400)

    found = paired_difference(delta.tolist(), [0.0] * 400)

    standard_error = delta.std(ddof=1) / 20
    assert found.low == pytest.approx(delta.mean() - 1.96 * standard_error, abs=0.15 * standard_error)
    assert found.high == pytest.approx(delta.mean() + 1.96 * standard_error, abs=0.15 * standard_error)
    assert found == paired_difference(delta.tolist(), [0.0] * 400)  # seeded


def test_a_difference_without_pairs_is_unknown_and_unequal_lengths_are_refused() -> None:
    assert paired_difference([], []).value is None
    with pytest.raises(DataError, match="as many"):
        paired_difference([1.0], [])


# ---- router ---------------------------------------------------------------------------------------------------------


def test_the_auc_counts_ties_as_one_half() -> None:
    # Pairs (positive, negative): 0.8 > 0.4, 0.8 > 0.5, 0.5 > 0.4, 0.5 = 0.5 -> 3.5 of 4.
    assert roc_auc([0.8, 0.5, 0.4, 0.5], [True, True, False, False]) == 3.5 / 4


def test_the_auc_of_one_kind_is_unknown() -> None:
    assert roc_auc([0.1, 0.2], [True, True]) is None
    assert roc_auc([], []) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_the_auc_is_scikit_learns(rows: list[tuple[int, bool]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the peer here")
    scores, labels = [score / 5 for score, _ in rows], [label for _, label in rows]

    found = roc_auc(scores, labels)

    if len(set(labels)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_the_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    # [0.1, 0.2): mean 0.15, share 1/2; [0.9, 1]: mean 0.95, share 1 -> 2/4 * 0.35 + 2/4 * 0.05.
    error, bins = reliability([0.1, 0.199, 0.9, 1.0], [False, True, True, True])

    assert error == pytest.approx(0.5 * abs(0.1495 - 0.5) + 0.5 * abs(0.95 - 1))
    assert [found.rows for found in bins] == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert (bins[9].mean_probability, bins[9].thinking_share) == (pytest.approx(0.95), 1.0)
    assert bins[0].mean_probability is None


def test_a_perfectly_calibrated_router_has_no_error() -> None:
    error, _ = reliability([0.25] * 4 + [0.75] * 4, [True, False, False, False, True, True, True, False])

    assert error == pytest.approx(0)
    assert reliability([], [])[0] is None


def test_the_confusion_counts_labels_by_row_and_decisions_by_column() -> None:
    predicted = [True, True, False, False, True]
    labelled = [True, False, False, True, True]

    assert confusion(predicted, labelled) == ((1, 1), (1, 2))


# ---- seconds --------------------------------------------------------------------------------------------------------


def test_a_step_is_paid_by_the_rows_that_take_part_in_it() -> None:
    # 4 steps of 1 s: two rows share the first 2 (1 s each), the longer one pays the other 2 alone.
    assert share_seconds(4.0, [2, 4]) == [1.0, 3.0]
    assert share_seconds(4.0, [4, 2]) == [3.0, 1.0]


def test_rows_without_tokens_cost_nothing_beside_rows_with_some() -> None:
    assert share_seconds(2.0, [0, 2]) == [0.0, 2.0]
    assert share_seconds(2.0, [0, 0]) == [1.0, 1.0]
    assert share_seconds(2.0, []) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.floats(0, 1e4))
def test_the_shares_add_up_and_longer_answers_cost_no_less(tokens: list[int], seconds: float) -> None:
    shares = share_seconds(seconds, tokens)

    assert math.fsum(shares) == pytest.approx(seconds, abs=1e-6)
    by_tokens = [share for _, share in sorted(zip(tokens, shares, strict=True))]
    assert by_tokens == sorted(by_tokens)


def test_the_mean_of_nothing_is_unknown() -> None:
    assert mean([]) is None
    assert mean([1, 2]) == 1.5
