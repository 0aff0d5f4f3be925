"""The gradient of a step depends on its rows, not on how they are split into micro-batches."""

import pytest
import torch

from metis_home.router import IGNORE
from metis_home.training.sft import MetisSFTTrainer
from tests.training.sft.small import records, small_model, trainer

SPLITS = {"1 x 8": 8, "2 x 4": 4, "8 x 1": 1, "4 x 2": 2}


class Recorder(MetisSFTTrainer):
    """Keeps the gradients that the optimizer would have used."""

    gradients: dict


def gradients_of(tmp_path, rows, per_batch: int, *, hide_targets_of: tuple[int, ...] = (), **settings):
    """Gradients of the first step on all rows, in file order, before clipping, with the loss that is logged."""
    import transformers

    found = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    model = small_model()
    steps = len(rows) // per_batch
    run = trainer(
        tmp_path,
        rows,
        model,
        per_device_train_batch_size=per_batch,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        check_data=False,
        **settings,
    )
    run.add_callback(Keep())
    if hide_targets_of:
        collate = run.data_collator

        def hiding(examples):
            batch = collate(examples)
            for row, index in enumerate(batch["record_index"].tolist()):
                if index in hide_targets_of:
                    batch["labels"][row] = IGNORE
            return batch

        run.data_collator = hiding
    run.train()
    return found, run.state.log_history[0]


def by_hand(rows, *, hidden: tuple[int, ...] = (), router_weight: float = 1.0):
    """The loss of all rows and its gradient, one row at a time, from the definition."""
    from metis_home.training.data.encode import Encoder
    from tests.training.sft.small import processor

    model = small_model().train()
    encoder = Encoder(processor(), system_prompt=None)
    lm, router, tokens, queries = 0.0, 0.0, 0, 0
    for index, record in enumerate(rows):
        example = encoder.example(record)
        ids = torch.tensor([example.input_ids])
        labels = torch.tensor([example.labels])
        images = {}
        if example.pixel_values is not None:
            images = {"pixel_values": example.pixel_values, "image_grid_thw": example.image_grid_thw}
        branch = example.router_label
        if branch == IGNORE:
            prompt = labels[0] == IGNORE
            branch = int(model.route(input_ids=ids[:, prompt], **images).branch_ids)
        out = model(
            input_ids=ids, mm_token_type_ids=torch.tensor([example.mm_token_type_ids]), branch_ids=branch, **images
        )
        if index not in hidden:
            for place in range(1, ids.shape[1]):
                if labels[0, place] != IGNORE:
                    lm = lm - out.logits[0, place - 1].double().log_softmax(-1)[labels[0, place]]
                    tokens += 1
        if example.router_label != IGNORE:
            prompt = labels[0] == IGNORE
            routed = model.route(input_ids=ids[:, prompt], **images)
            router = router - routed.logits[0].double().log_softmax(-1)[example.router_label]
            queries += 1
    loss = lm / max(tokens, 1) + router_weight * router / max(queries, 1)
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("per_batch", SPLITS.values(), ids=SPLITS.keys())
def test_the_gradient_is_the_definitions_for_every_split(tmp_path, per_batch: int) -> None:
    rows = records(8, unlabelled=(4, 5))

    gradients, logged = gradients_of(tmp_path, rows, per_batch, router_loss_weight=0.5)

    loss, expected = by_hand(rows, router_weight=0.5)
    assert gradients.keys() >= expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=2e-4, atol=2e-6)
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("per_batch", [8, 2, 1])
def test_a_micro_batch_without_any_target_adds_nothing(tmp_path, per_batch: int) -> None:
    rows = records(8, unlabelled=(2, 3))
    hidden = (2, 3)  # with two rows per batch: one whole micro-batch has neither tokens nor router labels

    gradients, logged = gradients_of(tmp_path, rows, per_batch, hide_targets_of=hidden)

    loss, expected = by_hand(rows, hidden=hidden)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), rtol=2e-4, atol=2e-6)
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
