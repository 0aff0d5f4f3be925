"""A loss or gradient that is no number stops the run before weights or checkpoints change."""

import pytest
import torch

from metis_home.errors import TrainingError
from tests.training.sft.small import records, small_model, trainer


def poison_loss(run, record: int) -> None:
    """Make the tokens of one record cost infinitely much."""
    collate = run.data_collator

    def poisoned(examples):
        batch = collate(examples)
        if record in batch["record_index"].tolist():
            batch["pixel_values"] = batch["pixel_values"] * float("nan")
        return batch

    run.data_collator = poisoned


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(tmp_path, accumulation: int) -> None:
    model, train = small_model(), records(8)
    run = trainer(
        tmp_path,
        train,
        model,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        train_sampling_strategy="sequential",
    )
    poison_loss(run, 6)  # in the last micro-batch
    steps = 4 // accumulation

    with pytest.raises(TrainingError, match=rf"step {steps}: the loss(.|\n)*rows row-6, row-7"):
        run.train()

    last = tmp_path / f"checkpoint-{steps - 1}"
    assert last.is_dir()
    assert not (tmp_path / f"checkpoint-{steps}").exists()
    saved = type(model).from_pretrained(last).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_a_gradient_that_is_no_number_stops_the_run_without_a_step(tmp_path) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.lm_head.weight.register_hook(lambda gradient: gradient / 0)
    run = trainer(tmp_path, records(4), model, per_device_train_batch_size=4)

    with pytest.raises(TrainingError, match="step 1: a gradient"):
        run.train()

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_guard_can_be_switched_off(tmp_path) -> None:
    model = small_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient / 0)
    run = trainer(tmp_path, records(4), model, per_device_train_batch_size=4, stop_on_nan=False, max_steps=1)

    run.train()

    assert not torch.isfinite(model.lm_head.weight).all()
