"""The cases that `run.py` hands to pytest: transformers' model tests on stock Qwen2.5-VL and on our classes.

Both run on the same sizes and the same inputs; ours also gets router labels where a test asks for labels, since without
them the loss does not reach the router.
"""

import inspect
import unittest
from typing import ClassVar
from unittest import mock

import torch
import transformers_tests.test_modeling_common as mixin_module
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.auto import modeling_auto
from transformers_tests.test_configuration_common import ConfigTester

import metis_home.configuration as configuration
from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration, MetisHomeModel
from metis_home.modeling import MetisHomePreTrainedModel

BATCH, TEXT_TOKENS, VOCABULARY = 3, 7, 99
IMAGE, VIDEO, VISION_START, VISION_END = 3, 4, 5, 6
GRID = (1, 2, 2)  # time, height, width in patches: 4 image tokens, as spatial_merge_size is 1
IMAGE_TOKENS = GRID[0] * GRID[1] * GRID[2]
PATCH, TEMPORAL, CHANNELS = 14, 2, 3

# The mixin looks classes up by name to know what inputs and labels they take.
for mapping, name in [
    (modeling_auto.MODEL_MAPPING_NAMES, "MetisHomeModel"),
    (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "MetisHomeForConditionalGeneration"),
    (modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "MetisHomeForConditionalGeneration"),
]:
    mapping["metis_home"] = name


def _raise_existing_epsilons(config) -> None:
    for part in (config, config.text_config, config.vision_config):
        for name in vars(part):
            if name.endswith("_eps"):
                setattr(part, name, 1.0)


# The mixin's own function also *adds* fields that the config does not have; ours, read back from disk, refuses those.
mixin_module.set_config_for_less_flaky_test = _raise_existing_epsilons


class Tester:
    """Sizes and inputs; the attribute names are those that the mixin reads."""

    batch_size = BATCH
    seq_length = TEXT_TOKENS + IMAGE_TOKENS + 2
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    is_training = True

    def __init__(self, parent: unittest.TestCase, config_class: type) -> None:
        self.parent = parent
        self.config_class = config_class

    def fields(self) -> dict:
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        }
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 1,
            "temporal_patch_size": TEMPORAL,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
            "in_channels": CHANNELS,
        }
        ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
        marks = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
        return {"text_config": text, "vision_config": vision, **ids, **marks}

    def get_config(self):
        return self.config_class(**self.fields())

    def prepare_config_and_inputs_for_common(self):
        text = mixin_module.ids_tensor([BATCH, TEXT_TOKENS], VOCABULARY - 10) + 10
        image = torch.tensor([VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END]).expand(BATCH, -1)
        input_ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == IMAGE).long(),
            "pixel_values": torch.randn(BATCH * IMAGE_TOKENS, CHANNELS * TEMPORAL * PATCH**2),
            "image_grid_thw": torch.tensor([GRID] * BATCH),
        }
        return self.get_config(), inputs


class Suite(mixin_module.ModelTesterMixin):
    """What both cases share."""

    config_class: ClassVar[type]
    all_model_classes: ClassVar[tuple[type, ...]]
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = Tester(self, self.config_class)

    def test_generation_tester_mixin_inheritance(self) -> None:
        self.skipTest("the generation mixin is not in the sdist; tests/model/ compares generation with the dense model")

    def test_config(self) -> None:
        tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, **self.model_tester.fields()
        )
        tester.create_and_test_config_common_properties()
        tester.create_and_test_config_to_json_file()
        tester.create_and_test_config_from_and_save_pretrained()
        tester.create_and_test_config_from_and_save_pretrained_subfolder()
        tester.create_and_test_config_from_and_save_pretrained_composite()
        tester.check_config_can_be_init_without_params()


class StockCase(Suite, unittest.TestCase):
    """The dense model as transformers ships it."""

    config_class = Qwen2_5_VLConfig
    all_model_classes = (Qwen2_5_VLModel, Qwen2_5_VLForConditionalGeneration)


class MetisHomeCase(Suite, unittest.TestCase):
    """Our two-branch model; no branch is named, so its router decides in every test."""

    config_class = MetisHomeConfig
    all_model_classes = (MetisHomeModel, MetisHomeForConditionalGeneration)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is MetisHomeForConditionalGeneration:
            inputs["router_labels"] = torch.arange(BATCH) % 2  # both branches get rows
        return inputs

    # These two load checkpoints without any weights. Ours refuses that, by design; without the refusal it has to do
    # what every model does.
    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        with _no_refusal():
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_init_all_missing_weights(self) -> None:
        with _no_refusal(), _dated_like_stock():
            super().test_can_init_all_missing_weights()

    def test_reverse_loading_mapping(self) -> None:
        # It invents configuration fields, which ours refuses when it reads them back; stock is skipped here. The
        # renaming shows on the model with head only.
        with mock.patch.object(configuration, "_refuse_unknown_fields"):
            super().test_reverse_loading_mapping(skip_base_model=True)


def _no_refusal():
    return mock.patch.object(MetisHomePreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"])


def _dated_like_stock():
    # The test is skipped for models from before 2023, by the year in the copyright line of the configuration's file.
    getfile = inspect.getfile

    def file_of(thing):
        return getfile(Qwen2_5_VLConfig if thing is MetisHomeConfig else thing)

    return mock.patch.object(inspect, "getfile", file_of)
