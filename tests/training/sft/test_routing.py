"""Teacher forcing, packing, what the router may read, and text-only batches."""

import pytest
import torch

from metis_home.training.data.collate import PackingCollator, PaddingCollator
from metis_home.training.data.records import load_records
from metis_home.training.sft.losses import losses_per_token
from metis_home.training.vision_presence import VisionPresence
from tests.training.sft.oracle import gradients_of
from tests.training.sft.small import batch_of, records, rows, small_model, trainer


def forward(model, batch: dict):
    arguments = {name: value for name, value in batch.items() if name != "record_index"}
    with losses_per_token(model):
        return model(**arguments, use_cache=False)


@pytest.mark.parametrize("label", ["thinking", "non_thinking"])
def test_rows_take_the_branch_of_their_label_whatever_the_router_says(tmp_path, label: str) -> None:
    chosen = [row for row in rows(8) if row["mode"] == label]
    model = small_model()
    with torch.no_grad():  # a router that is sure of the opposite
        model.model.router.output.bias.copy_(torch.tensor([9.0, -9.0] if label == "thinking" else [-9.0, 9.0]))
    other = 0 if label == "thinking" else 1
    experts = [layer.mlp.experts[other] for layer in model.model.language_model.layers]
    before = [expert.up_proj.weight.clone() for expert in experts]

    run = trainer(
        tmp_path, load_records(chosen), model, per_device_train_batch_size=4, train_sampling_strategy="sequential"
    )
    run.train()

    assert all(torch.equal(expert.up_proj.weight, old) for expert, old in zip(experts, before, strict=True))
    logged = run.state.log_history[0]
    assert ("lm_loss_thinking" in logged) == (label == "thinking")
    assert logged["router_accuracy"] == 0.0


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("collate", ["padded", "packed"])
def test_another_answer_leaves_the_router_logits_as_they_are_to_the_bit(pooling: str, collate: str) -> None:
    model = small_model(router_pooling=pooling)
    if pooling == "attention":
        torch.nn.init.normal_(model.model.router.query)
    collator = PaddingCollator(0) if collate == "padded" else PackingCollator(model.config, 0)
    written = rows(3)
    changed = [dict(row) for row in written]
    for row in changed:  # as long as before: another length would change the shapes of sums
        row["answer"] = row["answer"].replace("x", "7")
        if "reasoning" in row:
            row["reasoning"] = row["reasoning"].replace("because", "wherefo")

    first, second = batch_of(written, collator), batch_of(changed, collator)

    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(forward(model, first).router_logits, forward(model, second).router_logits)


def test_an_answer_of_another_length_changes_no_routing() -> None:
    model, written = small_model(), rows(3)
    longer = [{**row, "answer": row["answer"] * 5} for row in written]

    first, second = (forward(model, batch_of(some)).router_logits for some in (written, longer))

    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_packed_rows_have_the_gradients_of_padded_ones(tmp_path) -> None:
    rows_ = records(8)

    padded, logged = gradients_of(tmp_path, rows_, 8)
    packed, logged_packed = gradients_of(tmp_path, rows_, 4, packing=True)

    assert packed.keys() == padded.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], rtol=2e-4, atol=2e-6)
    for name in ("loss", "lm_loss_thinking", "lm_loss_non_thinking", "router_loss", "router_auc", "thinking_ratio"):
        assert logged_packed[name] == pytest.approx(logged[name], rel=1e-5), name


def test_a_text_only_batch_gives_the_vision_tower_zeros_and_changes_nothing_else(tmp_path) -> None:
    rows_ = records(4, images=False)

    gradients, logged = gradients_of(tmp_path, rows_, 4)
    frozen, logged_frozen = gradients_of(tmp_path, rows_, 4, freeze=["vision"])

    tower = {name for name in gradients if ".visual." in name}
    assert tower == {name for name, _ in small_model().named_parameters() if ".visual." in name}
    assert all(not gradients[name].any() for name in tower)
    assert {name: torch.equal(frozen[name], gradients[name]) for name in frozen} == dict.fromkeys(frozen, True)
    assert logged["loss"] == logged_frozen["loss"]


def test_the_vision_tower_is_called_only_where_it_has_to_be() -> None:
    model = small_model()
    presence = VisionPresence(model)
    with_image, without = batch_of(rows(1)), batch_of(rows(2)[1:])

    assert not presence.is_needed(with_image)
    assert presence.is_needed(without)
    with torch.no_grad():
        assert not presence.is_needed(without)
    model.model.visual.requires_grad_(False)
    assert not presence.is_needed(without)
