"""The gradient of a step depends on its rows, not on how they are split into micro-batches."""

import pytest
import torch

from tests.training.sft.oracle import by_hand, gradients_of
from tests.training.sft.small import records, small_model, trainer

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


def test_a_frozen_routers_loss_pushes_nothing_and_is_still_reported(tmp_path) -> None:
    gradients, logged = gradients_of(tmp_path, records(8, unlabelled=(4, 5)), 4, freeze=["router"])

    loss, expected = by_hand(8, (4, 5), router_weight=0.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=2e-4, atol=2e-6)
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["router_loss"] > 0


def test_the_router_learns_at_its_own_rate(tmp_path) -> None:
    model = small_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(
        tmp_path,
        records(8),
        model,
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-6,
        router_learning_rate=1e-2,
    )

    run.train()

    # the first step of Adam moves every number with a gradient by its learning rate
    moved = {name: float((p - before[name]).detach().abs().max()) for name, p in model.named_parameters()}
    assert moved["model.router.output.bias"] == pytest.approx(1e-2, rel=1e-3)
    assert max(change for name, change in moved.items() if "router" not in name) == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(("cache_gib", "encoded"), [(1.0, 4), (0.0, 8)])
def test_rows_are_encoded_once_while_memory_allows(tmp_path, cache_gib: float, encoded: int, monkeypatch) -> None:
    run = trainer(tmp_path, records(4), per_device_train_batch_size=4, max_steps=2, cache_gib=cache_gib)
    calls, example = [], run._encoder.example
    monkeypatch.setattr(run._encoder, "example", lambda record: calls.append(record.id) or example(record))

    run.train()

    assert len(calls) == encoded
