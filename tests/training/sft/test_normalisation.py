"""The gradient of a step depends on its rows, not on how they are split into micro-batches."""

import pytest
import torch

from tests.training.sft.oracle import by_hand, gradients_of
from tests.training.sft.small import records

SPLITS = {"1 x 8": 8, "2 x 4": 4, "8 x 1": 1, "4 x 2": 2}


@pytest.mark.parametrize("per_batch", SPLITS.values(), ids=SPLITS.keys())
def test_the_gradient_is_the_definitions_for_every_split(tmp_path, per_batch: int) -> None:
    rows = records(8, unlabelled=(4, 5))

    gradients, logged = gradients_of(tmp_path, rows, per_batch, router_loss_weight=0.5)

    loss, expected = by_hand(8, (4, 5), router_weight=0.5)
    assert gradients.keys() >= expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=2e-4, atol=2e-6)
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("per_batch", [8, 2, 1])
def test_a_micro_batch_without_any_target_adds_nothing(tmp_path, per_batch: int) -> None:
    rows = records(8, unlabelled=(2, 3))
    hidden = (2, 3)  # with two rows per batch: one whole micro-batch has neither tokens nor router labels

    gradients, logged = gradients_of(tmp_path, rows, per_batch, hide_targets_of=hidden)

    loss, expected = by_hand(8, (2, 3), hidden=hidden)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=2e-4, atol=2e-6)
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
