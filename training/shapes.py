"""Sizes of the published Qwen2.5-VL models, for estimates before there is a checkpoint.

Source: the `config.json` of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
"""

from typing import Any, Literal

from transformers import Qwen2_5_VLConfig

from metis_home.configuration import MetisHomeConfig

Size = Literal["3b", "7b", "32b", "72b"]

_TEXT = {
    "3b": (2048, 11008, 36, 16, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "32b": (5120, 27648, 64, 40, 8, 152064),
    "72b": (8192, 29568, 80, 64, 8, 152064),
}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_VISION_FFN = {"3b": 3420, "7b": 3420, "32b": 3456, "72b": 3456}


def two_branch_shape(size: Size) -> MetisHomeConfig:
    """Configuration of the two-branch model that a dense Qwen2.5-VL of this size becomes."""
    return MetisHomeConfig(**_sections(size))


def dense_shape(size: Size) -> Qwen2_5_VLConfig:
    """Configuration of the dense Qwen2.5-VL of this size."""
    return Qwen2_5_VLConfig(**_sections(size))


def _sections(size: Size) -> dict[str, Any]:
    text = dict(zip(_FIELDS, _TEXT[size], strict=True))
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": _VISION_FFN[size],
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return {
        "text_config": {**text, "rope_parameters": rope, "max_position_embeddings": 128_000},
        "vision_config": vision,
        "tie_word_embeddings": size == "3b",
    }
