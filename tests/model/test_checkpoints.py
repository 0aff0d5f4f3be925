"""Loading and saving: both key layouts, shards, tied heads, dtypes, with and without head; wrong checkpoints refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import Qwen2_5_VLForConditionalGeneration as Dense

from metis_home import MetisHomeForConditionalGeneration, MetisHomeModel
from metis_home.errors import CheckpointError, ConfigError
from tests.model.pico import TEXT_ROWS, collate, dense_twin, pico_model


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def names_in(directory) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


@pytest.mark.parametrize("hub_layout", [True, False], ids=["hub layout", "module layout"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_a_saved_model_loads_again(model, tmp_path, hub_layout, shard, auto_class):
    model.save_pretrained(tmp_path, max_shard_size=shard, save_original_format=hub_layout)

    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)

    prefix = "model.layers.0" if hub_layout else "model.language_model.layers.0"
    assert f"{prefix}.mlp.experts.1.up_proj.weight" in names_in(tmp_path)
    assert "model.router.hidden.weight" in names_in(tmp_path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is MetisHomeForConditionalGeneration
    assert same_weights(loaded, model)


@pytest.mark.parametrize("hub_layout", [True, False])
def test_the_model_without_head_loads_from_the_same_files(model, tmp_path, hub_layout):
    model.save_pretrained(tmp_path / "whole", save_original_format=hub_layout)

    base = AutoModel.from_pretrained(tmp_path / "whole")

    assert type(base) is MetisHomeModel
    assert same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert same_weights(MetisHomeModel.from_pretrained(tmp_path / "base"), base)


def test_mixed_layouts_in_one_checkpoint_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("model.layers.1.", "model.language_model.layers.1.").replace(
            "visual.merger", "model.visual.merger"
        ): x
        for name, x in tensors.items()
    }
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert same_weights(MetisHomeForConditionalGeneration.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_heads(tmp_path, tied):
    model = pico_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)

    loaded = MetisHomeForConditionalGeneration.from_pretrained(tmp_path)

    assert ("lm_head.weight" in names_in(tmp_path)) is not tied
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) is tied
    with torch.no_grad():
        batch = collate(TEXT_ROWS)
        assert torch.equal(loaded(**batch, branch_ids=0).logits, dense_twin(model, 0)(**batch).logits)


def test_dtype_auto_and_device_map(tmp_path):
    model = pico_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto", device_map="auto")

    assert loaded.dtype == torch.bfloat16
    assert loaded.generate(**collate(TEXT_ROWS), thinking=True, max_new_tokens=2).shape[0] == 4


def test_layers_on_several_devices(model, tmp_path):
    """`device_map` never cuts through a decoder layer; offloaded layers get their branch plan."""
    model.save_pretrained(tmp_path)
    text = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {"model.visual": "cpu", "model.router": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{name}": "cpu" for name in text} | {"model.language_model.layers.1": "disk"}

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")

    with torch.no_grad():
        batch = collate(TEXT_ROWS)
        ids = torch.tensor([1, 0, 0, 1])
        assert torch.equal(loaded(**batch, branch_ids=ids).logits, model(**batch, branch_ids=ids).logits)
    assert "MetisHomeDecoderLayer" in model._no_split_modules


class TestWrongCheckpoints:
    def test_a_dense_one_is_refused_with_what_to_do(self, model, tmp_path):
        dense_twin(model, 0).save_pretrained(tmp_path)

        with pytest.raises(ConfigError, match="metis-home convert DENSE OUT"):
            MetisHomeForConditionalGeneration.from_pretrained(tmp_path)

    @pytest.mark.parametrize("cls", [MetisHomeForConditionalGeneration, MetisHomeModel])
    def test_dense_weights_under_our_config_are_refused(self, model, tmp_path, cls):
        dense_twin(model, 0).save_pretrained(tmp_path)
        model.config.save_pretrained(tmp_path)

        with pytest.raises(CheckpointError, match=r"17 weights .* missing.*metis-home convert"):
            cls.from_pretrained(tmp_path)

    def test_a_checkpoint_that_lost_its_router_is_refused(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "router.output" not in k}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

        with pytest.raises(CheckpointError, match=r"2 weights .*router\.output"):
            MetisHomeForConditionalGeneration.from_pretrained(tmp_path)

    def test_stock_classes_refuse_ours(self, model, tmp_path):
        model.save_pretrained(tmp_path)

        with pytest.raises(StrictDataclassFieldValidationError, match="load it with metis_home"):
            Dense.from_pretrained(tmp_path)

    def test_ours_says_what_it_is(self, model, tmp_path):
        model.save_pretrained(tmp_path)

        config = json.loads((tmp_path / "config.json").read_text())

        assert config["model_type"] == "metis_home"
        assert config["architectures"] == ["MetisHomeForConditionalGeneration"]
