"""The small JSON files of a checkpoint: dense -> two-branch and back."""

from typing import Literal

from ..config_fields import (
    ARCHITECTURE,
    GENERATION_FIELDS,
    MODEL_TYPE,
    PROCESSOR_CLASS,
    ROOT_FIELDS,
    TEXT_FIELDS,
    TEXT_MODEL_TYPE,
    guard_text_fields,
    unguard_text_fields,
)
from .schema import DENSE_ARCHITECTURE, DENSE_MODEL_TYPE
from .strict_json import Json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
DENSE_PROCESSOR_CLASS = "Qwen2_5_VLProcessor"
_DENSE_TEXT_MODEL_TYPE = "qwen2_5_vl_text"
_VISION_MODEL_TYPE = "qwen2_5_vl_vision"

# The fields of the Qwen2.5-VL configs in transformers 4.49 to 5.23 (tests/convert/test_config_files.py compares them
# with the installed classes). The two-branch config refuses every other, so only these are carried over.
_COMMON = frozenset(
    [
        "architectures",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
    ]
)
_TEXT = _COMMON | frozenset(
    [
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "use_cache",
        "use_sliding_window",
        "vocab_size",
    ]
)
_VISION = _COMMON | frozenset(
    [
        "depth",
        "fullatt_block_indexes",
        "hidden_act",
        "hidden_size",
        "in_channels",
        "in_chans",
        "initializer_range",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "patch_size",
        "rope_parameters",
        "spatial_merge_size",
        "spatial_patch_size",
        "temporal_patch_size",
        "tokens_per_second",
        "window_size",
    ]
)
_ROOT = _COMMON | frozenset(
    [
        "image_token_id",
        "text_config",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_start_token_id",
        "vision_token_id",
    ]
)
_TWO_BRANCH_ONLY = frozenset({*ROOT_FIELDS, *TEXT_FIELDS, "ffn_implementation"})
# Of no use elsewhere, so that leaving them out is no news.
_SILENTLY_DROPPED = frozenset({"_name_or_path", "_attn_implementation_autoset", "_commit_hash"})


def two_branch_config(
    dense: dict[str, Json], *, dtype: str | None = None, router: dict[str, Json] | None = None
) -> tuple[dict[str, Json], list[str]]:
    """Return the `config.json` of the two-branch model, and the names of fields that no Qwen2.5-VL config has.

    Args:
        dense: the config of the source, nested or flat.
        dtype: `bfloat16`, `float16` or `float32` where the weights were cast, else None.
        router: values for `ROOT_FIELDS` that are not the defaults.
    """
    dropped: list[str] = []
    flat = "text_config" not in dense
    root = _carry(dense, _ROOT | _TEXT if flat else _ROOT, "", dropped)
    text, vision = dense.get("text_config"), dense.get("vision_config")
    if isinstance(text, dict):
        text = _carry(text, _TEXT, "text_config.", dropped)
        text |= {"model_type": TEXT_MODEL_TYPE, **TEXT_FIELDS}
        text.pop("architectures", None)
        root["text_config"] = guard_text_fields(text)
    else:
        root = guard_text_fields({**root, **TEXT_FIELDS})
    if isinstance(vision, dict):
        vision = _carry(vision, _VISION, "vision_config.", dropped)
        vision["model_type"] = _VISION_MODEL_TYPE  # old checkpoints say qwen2_5_vl
        root["vision_config"] = vision
    root |= {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], **ROOT_FIELDS, **(router or {})}
    if dtype is not None:
        for config in (root, root.get("text_config"), root.get("vision_config")):
            if isinstance(config, dict):
                config |= {name: dtype for name in ("dtype", "torch_dtype") if name in config}
        if "dtype" not in root and "torch_dtype" not in root:
            root["dtype"] = dtype
    return root, dropped


def dense_config(two_branch: dict[str, Json]) -> dict[str, Json]:
    """Return the `config.json` of one branch as a stock model."""
    root = unguard_text_fields(two_branch)
    root = {name: value for name, value in root.items() if name not in _TWO_BRANCH_ONLY and name != "auto_map"}
    text = root.get("text_config")
    if isinstance(text, dict):
        text = {name: value for name, value in unguard_text_fields(text).items() if name not in _TWO_BRANCH_ONLY}
        root["text_config"] = {**text, "model_type": _DENSE_TEXT_MODEL_TYPE}
    return {**root, "model_type": DENSE_MODEL_TYPE, "architectures": [DENSE_ARCHITECTURE]}


def two_branch_generation(dense: dict[str, Json] | None, config: dict[str, Json]) -> dict[str, Json]:
    """Return `generation_config.json` with the router's threshold.

    Args:
        dense: that of the source, or None if it has none. Then the special tokens come from the model config, from
            where transformers would have taken them.
        config: the `config.json` of the source.
    """
    if dense is None:
        text = config.get("text_config", config)
        text = text if isinstance(text, dict) else config
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        dense = {name: text.get(name, config.get(name)) for name in names}
        dense = {name: value for name, value in dense.items() if value is not None}
    # The mark makes transformers read the known fields only, and the threshold would be lost.
    carried = {name: value for name, value in dense.items() if name != "_from_model_config"}
    return {**carried, **GENERATION_FIELDS}


def dense_generation(two_branch: dict[str, Json]) -> dict[str, Json]:
    """The inverse of `two_branch_generation`."""
    return {name: value for name, value in two_branch.items() if name not in GENERATION_FIELDS}


def with_processor_class(file: dict[str, Json], kind: Literal["two-branch", "dense"]) -> dict[str, Json]:
    """Return a processor or tokenizer file that names the processor class of this `kind`, if it names one at all."""
    if "processor_class" not in file:
        return file
    return {**file, "processor_class": PROCESSOR_CLASS if kind == "two-branch" else DENSE_PROCESSOR_CLASS}


def _carry(config: dict[str, Json], known: frozenset[str], prefix: str, dropped: list[str]) -> dict[str, Json]:
    dropped.extend(prefix + name for name in config if name not in known | _SILENTLY_DROPPED)
    return {name: value for name, value in config.items() if name in known}
