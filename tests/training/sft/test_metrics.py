"""Numbers about queries against hand-computed cases and brute force."""

import math

import numpy as np
import pytest

from metis_home.training.sft.metrics import NUM_COLUMNS, auc, expected_calibration_error, summarize

NAN = float("nan")


def lines(*rows: tuple) -> np.ndarray:
    """(record, branch, label, tokens, lm sum, router loss, P(thinking))"""
    table = np.array(rows, dtype=np.float32)
    assert table.shape[1] == NUM_COLUMNS
    return table


def test_losses_are_weighted_by_tokens_and_the_router_by_queries() -> None:
    table = lines(
        (0, 1, 1, 30, 60.0, 0.1, 0.9),
        (1, 0, 0, 2, 10.0, 0.3, 0.6),
        (2, 0, -100, 8, 10.0, 0.0, 0.2),
    )

    report = summarize(table, ["sums", "words", "words"], router_loss_weight=0.5)

    assert report["lm_loss"] == pytest.approx(80 / 40)
    assert report["lm_loss_thinking"] == pytest.approx(2.0)
    assert report["lm_loss_non_thinking"] == pytest.approx(20 / 10)
    assert report["router_loss"] == pytest.approx(0.2)
    assert report["loss"] == pytest.approx(2.0 + 0.5 * 0.2)
    assert report["router_accuracy"] == 0.5
    assert report["router_auc"] == 1.0
    assert report["thinking_ratio"] == pytest.approx(2 / 3)
    assert report["thinking_ratio/sums"] == 1.0
    assert report["thinking_ratio/words"] == 0.5


def test_what_nothing_is_known_about_is_left_out() -> None:
    unlabelled = lines((0, 1, -100, 4, 8.0, NAN, NAN))

    report = summarize(unlabelled, ["a"], router_loss_weight=1.0)

    assert report == {"lm_loss": 2.0, "lm_loss_thinking": 2.0, "loss": 2.0}
    assert summarize(np.zeros((0, NUM_COLUMNS)), [], router_loss_weight=1.0) == {}


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    score = generator.integers(0, 6, 60) / 5  # many ties
    is_positive = generator.random(60) < 0.4

    pairs = [(p, n) for p in score[is_positive] for n in score[~is_positive]]
    expected = np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])
    assert auc(score, is_positive) == pytest.approx(expected, abs=1e-12)
    assert auc(score, np.ones(60, bool)) is None


def test_auc_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(1)
    score, is_positive = generator.random(200).round(2), generator.random(200) < 0.3

    assert auc(score, is_positive) == pytest.approx(metrics.roc_auc_score(is_positive, score), abs=1e-12)


def test_calibration_error_of_a_hand_computed_case() -> None:
    # confidences 0.9, 0.9, 0.7, 0.6 in three of the 15 bins; right: yes, no, yes, no
    probability = np.array([0.9, 0.1, 0.3, 0.6])
    is_positive = np.array([True, True, False, False])

    error = expected_calibration_error(probability, is_positive)

    assert error == pytest.approx((abs(1 - 1.8) + abs(1 - 0.7) + abs(0 - 0.6)) / 4)


def test_perfect_confidence_has_no_calibration_error() -> None:
    probability, is_positive = np.array([1.0, 0.0, 1.0]), np.array([True, False, True])

    assert expected_calibration_error(probability, is_positive) == 0.0


def test_a_calibrated_coin_has_a_small_calibration_error() -> None:
    generator = np.random.default_rng(2)
    probability = generator.random(20000)
    is_positive = generator.random(20000) < probability

    assert expected_calibration_error(probability, is_positive) < 4 / math.sqrt(20000)
