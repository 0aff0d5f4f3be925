"""Training the router alone: the full model's gradients without its decoder, and a checkpoint where nothing else changed."""

import hashlib
import json

import pytest
import torch

from metis_home import MetisHomeForConditionalGeneration
from metis_home.convert import upcycle, verify
from metis_home.errors import CheckpointError, RecipeError, TrainingError
from metis_home.names import ROUTER_PREFIX
from metis_home.router import IGNORE
from metis_home.training.data.encode import Encoder
from metis_home.training.sft import train_router
from metis_home.training.sft.losses import query_losses
from metis_home.training.sft.router_checkpoint import replace_router, stored_tensors
from metis_home.training.sft.router_only import load_for_routing, router_tensors_of
from tests.processing.tiny import write_dense_model
from tests.training.sft.oracle import KeepGradients
from tests.training.sft.small import config, processor, records, rows, small_model, trainer

POOLINGS = ("mean", "attention")


def saved(path, **fields):
    """A two-branch directory, in several shards."""
    small_model(**fields).save_pretrained(path, max_shard_size="200KB")
    processor().save_pretrained(path)
    return path


def digests(path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir()) if file.is_file()
    }


def router_gradients_of_the_full_model(rows, **fields) -> dict[str, torch.Tensor]:
    """From whole rows with their answers, through `forward` and its own router loss; one row at a time."""
    model = small_model(**fields).train()
    encoder = Encoder(processor(), system_prompt=None)
    labelled = [record for record in rows if record.mode is not None]
    for record in labelled:
        example = encoder.example(record)
        images = {}
        if example.pixel_values is not None:
            images = {"pixel_values": example.pixel_values, "image_grid_thw": example.image_grid_thw}
        out = model(
            input_ids=torch.tensor([example.input_ids]),
            labels=torch.tensor([example.labels]),
            mm_token_type_ids=torch.tensor([example.mm_token_type_ids]),
            router_labels=torch.tensor([example.router_label]),
            **images,
        )
        (query_losses(out.router_logits, torch.tensor([example.router_label])).sum() / len(labelled)).backward()
    return {name: p.grad for name, p in model.named_parameters() if name.startswith(ROUTER_PREFIX)}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_its_gradients_are_those_of_the_full_model(tmp_path, pooling: str) -> None:
    keep = KeepGradients()
    rows, model = records(8, unlabelled=(3,)), small_model(router_pooling=pooling)
    run = trainer(
        tmp_path,
        rows,
        model,
        train_only=["router"],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0,
    )
    run.add_callback(keep)

    run.train()

    expected = router_gradients_of_the_full_model(rows, router_pooling=pooling)
    assert keep.found.keys() == expected.keys()
    for name, gradient in keep.found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_no_decoder_layer_runs(tmp_path) -> None:
    model = small_model()
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("a decoder layer was called"))

    run = trainer(tmp_path, records(4), model, train_only=["router"], per_device_train_batch_size=4)
    run.train()
    run.evaluate(records(4))

    assert run.state.global_step == 2
    assert "forward" not in vars(model)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_routers_tensors_change_in_the_checkpoint(tmp_path, pooling: str) -> None:
    directory = saved(tmp_path / "model", router_pooling=pooling)
    before, files = stored_tensors(directory), digests(directory)
    originals = MetisHomeForConditionalGeneration.from_pretrained(directory).state_dict()
    router_files = {tensor.file.name for name, tensor in before.items() if name.startswith(ROUTER_PREFIX)}
    assert len({tensor.file for tensor in before.values()}) > len(router_files)

    report = train_router(
        directory, rows(8), config(tmp_path / "out", max_steps=4, per_device_train_batch_size=4), eval_records=rows(6)
    )

    assert stored_tensors(directory) == before  # same types, shapes and places
    now = digests(directory)
    assert now.keys() == files.keys()
    assert {name for name in now if now[name] != files[name]} == {*router_files, "config.json"}
    model = MetisHomeForConditionalGeneration.from_pretrained(directory)
    assert model.config.router_trained
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, originals[name])}
    assert changed
    assert all(name.startswith(ROUTER_PREFIX) for name in changed)
    assert report.eval_metrics["eval_router_loss"] > 0
    assert 0 < report.loaded_gib < report.checkpoint_gib


def test_the_written_router_is_the_one_that_was_evaluated(tmp_path) -> None:
    directory = saved(tmp_path / "model")

    report = train_router(
        directory, rows(8), config(tmp_path / "out", max_steps=4, per_device_train_batch_size=8), eval_records=rows(8)
    )

    model = MetisHomeForConditionalGeneration.from_pretrained(directory)
    again = trainer(tmp_path / "again", records(8), model, train_only=["router"]).evaluate(records(8))
    assert again["eval_loss"] == pytest.approx(report.eval_metrics["eval_loss"], rel=1e-6)


def test_the_converters_manifest_still_verifies(tmp_path) -> None:
    dense = write_dense_model(tmp_path / "dense")
    upcycle(dense, tmp_path / "two")

    train_router(
        tmp_path / "two",
        rows(4),
        config(tmp_path / "out", max_steps=1, per_device_train_batch_size=4),
        processor=processor(),
    )

    assert verify(tmp_path / "two", thinking=dense).digested_bytes > 0
    assert "untrained" not in (tmp_path / "two" / "README.md").read_text()
    assert json.loads((tmp_path / "two" / "config.json").read_text())["router_trained"] is True


def test_only_embeddings_vision_tower_and_router_are_loaded(tmp_path) -> None:
    directory = saved(tmp_path / "model")
    full = MetisHomeForConditionalGeneration.from_pretrained(directory)

    model, loaded = load_for_routing(directory)

    assert len(model.model.language_model.layers) == 0
    stored = stored_tensors(directory)
    parts = [name for name in stored if name.startswith(("visual.", "model.embed_tokens.", ROUTER_PREFIX))]
    assert loaded == sum(stored[name].end - stored[name].begin for name in parts)
    example = Encoder(processor(), system_prompt=None).prompt(records(1)[0])
    inputs = {"input_ids": torch.tensor([example.input_ids])}
    inputs |= {"pixel_values": example.pixel_values, "image_grid_thw": example.image_grid_thw}
    torch.testing.assert_close(model.route(**inputs).logits, full.route(**inputs).logits, rtol=1e-6, atol=1e-8)


def test_features_beyond_the_memory_limit_are_computed_again(tmp_path) -> None:
    results = []
    for cache_gib in (1.0, 0.0):
        model = small_model(router_pooling="attention")
        run = trainer(
            tmp_path,
            records(4),
            model,
            train_only=["router"],
            per_device_train_batch_size=2,
            max_steps=6,
            cache_gib=cache_gib,
        )
        run.train()
        results.append((run.train_dataset.kept, run.train_dataset.embedded, router_tensors_of(model)))

    (kept, embedded, with_memory), (kept_without, embedded_without, without_memory) = results
    assert (kept, embedded) == (4, 4)
    assert (kept_without, embedded_without) == (0, 12)
    for name, tensor in with_memory.items():
        assert torch.equal(tensor, without_memory[name])


def test_a_router_of_another_shape_is_refused_and_nothing_is_written(tmp_path) -> None:
    directory = saved(tmp_path / "model")
    before = digests(directory)

    with pytest.raises(CheckpointError, match="another router|has the router tensors"):
        replace_router(directory, router_tensors_of(small_model(router_hidden_size=8)))

    assert digests(directory) == before


def test_settings_that_do_not_go_with_it_are_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match="packing"):
        trainer(tmp_path, records(4), train_only=["router"], packing=True)
    with pytest.raises(RecipeError, match="router alone"):
        train_router(tmp_path, rows(4), config(tmp_path, freeze=["vision"]))


def test_a_router_without_any_label_cannot_learn(tmp_path) -> None:
    unlabelled = records(4, unlabelled=(0, 1, 2, 3))
    assert all(record.mode is None for record in unlabelled)

    with pytest.raises(TrainingError, match="no row has a mode"):
        trainer(tmp_path, unlabelled)
    assert trainer(tmp_path, unlabelled, freeze=["router"]).trains_router is False
    assert IGNORE == -100
