"""What the trainer has to agree with: the gradients of a step, as recorded and as the definition gives them."""

from functools import cache

import torch
import transformers

from metis_home.router import IGNORE
from metis_home.training.data.encode import Encoder
from tests.training.sft.small import processor, records, small_model, trainer


class KeepGradients(transformers.TrainerCallback):
    """Notes the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of(tmp_path, rows, per_batch: int, *, hide_targets_of: tuple[int, ...] = (), **settings):
    """Gradients of the first step on all rows, in file order, before clipping, with the loss that is logged."""
    keep = KeepGradients()
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
    run.add_callback(keep)
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
    return keep.found, run.state.log_history[0]


@cache
def by_hand(count: int, unlabelled: tuple[int, ...], *, hidden: tuple[int, ...] = (), router_weight: float = 1.0):
    """The loss of `records(count)` and its gradient, one row at a time, from the definition."""
    rows = records(count, unlabelled=unlabelled)
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
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
