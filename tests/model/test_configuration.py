"""The configuration is typed, refuses what it does not know, and cannot be mistaken for a dense one."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, Qwen2_5_VLConfig

from metis_home import MetisHomeConfig, MetisHomeTextConfig
from metis_home.config_fields import GUARD
from metis_home.errors import ConfigError
from tests.model.pico import SPECIAL, TEXT, VISION, pico_config


def test_it_survives_saving(tmp_path):
    config = pico_config(router_pooling="attention", router_hidden_size=12, router_loss_weight=0.5)
    config.save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is MetisHomeConfig
    assert type(loaded.text_config) is MetisHomeTextConfig
    differences = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in differences} == {
        k: v for k, v in config.to_dict().items() if k not in differences
    }


def test_a_dense_config_class_refuses_it(tmp_path):
    pico_config().save_pretrained(tmp_path)

    with pytest.raises(StrictDataclassFieldValidationError, match="load it with metis_home"):
        Qwen2_5_VLConfig.from_pretrained(tmp_path)


def test_the_guarded_value_comes_back(tmp_path):
    config = pico_config(text={"max_window_layers": 3, "use_sliding_window": True, "sliding_window": 7})
    config.save_pretrained(tmp_path)

    on_disk = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert on_disk["max_window_layers"] == GUARD
    loaded = MetisHomeConfig.from_pretrained(tmp_path).text_config
    assert (loaded.max_window_layers, loaded.sliding_window) == (3, 7)
    assert not hasattr(loaded, "guarded_max_window_layers")


def test_a_dense_checkpoint_is_refused(tmp_path):
    Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=dict(VISION), **SPECIAL).save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="metis-home convert"):
        MetisHomeConfig.from_pretrained(tmp_path)


def test_a_flat_config_of_old_checkpoints_is_understood():
    """transformers 4.49 wrote the text fields on the root, and the vision config with the root's model type."""
    flat = {
        **{name: value for name, value in TEXT.items() if name != "rope_parameters"},
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "rope_theta": 5e5,
        "vision_config": {**VISION, "model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14},
        "model_type": "metis_home",
        "num_experts": 2,
        "router_hidden_size": 12,
        "torch_dtype": "bfloat16",
        "vision_token_id": 7,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        **SPECIAL,
    }

    config = MetisHomeConfig.from_dict(flat)

    text = config.text_config
    assert (text.hidden_size, text.num_experts, config.router_hidden_size) == (32, 2, 12)
    assert text.rope_parameters["rope_theta"] == 5e5
    assert text.rope_parameters["mrope_section"] == [1, 1, 2]
    assert config.vision_config.model_type == "qwen2_5_vl_vision"
    assert config.tie_word_embeddings


def test_copies_of_text_fields_on_the_root_are_understood(tmp_path):
    """transformers 4.52 to 4.57 wrote them beside text_config; trainers set the special tokens there."""
    config = pico_config(eos_token_id=7, bos_token_id=8, pad_token_id=0, hidden_size=32, use_cache=True)
    config.save_pretrained(tmp_path)

    loaded = MetisHomeConfig.from_pretrained(tmp_path)

    assert loaded.text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_poolng": "mean"}, "Did you mean 'router_pooling'"),
        ({"something_else": 1}, "no field 'something_else'"),
        ({"text": {"num_expert": 2}}, "Did you mean 'num_experts'"),
        ({"text": {"num_experts": 3}}, "num_experts must be 2; found 3"),
        ({"text": {"ffn_implementation": "cuda"}}, "ffn_implementation must be one of auto, torch, triton"),
        ({"router_pooling": "max"}, "router_pooling must be one of mean, attention; found 'max'"),
        ({"router_hidden_size": 0}, "router_hidden_size must be a positive integer; found 0"),
        ({"router_hidden_size": "8"}, "router_hidden_size must be a positive integer; found '8'"),
        ({"router_loss_weight": -1}, "router_loss_weight must be a finite number >= 0; found -1"),
        ({"router_loss_weight": float("nan")}, "router_loss_weight must be a finite number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        pico_config(**fields)


def test_router_trained_is_a_truth_value():
    with pytest.raises(ConfigError, match="router_trained must be true or false; found 'yes'"):
        MetisHomeConfig(router_trained="yes")


def test_a_dense_text_config_object_is_refused():
    dense = Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=dict(VISION), **SPECIAL)

    with pytest.raises(ConfigError, match="text_config must be a MetisHomeTextConfig"):
        MetisHomeConfig(text_config=dense.text_config, vision_config=dict(VISION), **SPECIAL)
