"""Which tensors a dense Qwen2.5-VL has, by name and shape, from its `config.json` alone.

A checkpoint must have exactly these: a missing one would be random after loading, an unknown one would be lost.
Shapes: D hidden size, F FFN size, V vocabulary, and those of the vision tower.
"""

from dataclasses import dataclass

from ..errors import CheckpointError
from .strict_json import Json

DENSE_MODEL_TYPE = "qwen2_5_vl"
DENSE_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Defaults of the vision config in transformers 5.16 to 5.23, for fields that old checkpoints leave out.
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
# What changes the numbers that the shared part computes, beside the shapes; (field, default).
_TEXT_NUMBERS: dict[str, Json] = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "use_sliding_window": False}
_VISION_NUMBERS: dict[str, Json] = {
    "hidden_act": "silu",
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
}
_TOKEN_IDS: dict[str, Json] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@dataclass(frozen=True, slots=True)
class DenseShape:
    """The fields of a dense config that two sources of one model must share."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool
    vision: dict[str, int]
    numbers: dict[str, Json]
    """Fields without influence on shapes, with influence on what is computed."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """{name in the hub layout: shape} of every tensor, the head only where it is not tied."""
        return {**self._text(), **self._vision()}

    def _text(self) -> dict[str, tuple[int, ...]]:
        d, f, v = self.hidden_size, self.intermediate_size, self.vocab_size
        head = d // self.num_attention_heads
        queries, keys = head * self.num_attention_heads, head * self.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (v, d)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (d,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, d)
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
            shapes[prefix + "self_attn.o_proj.weight"] = (d, queries)
            shapes[prefix + "post_attention_layernorm.weight"] = (d,)
            shapes[prefix + "mlp.gate_proj.weight"] = (f, d)
            shapes[prefix + "mlp.up_proj.weight"] = (f, d)
            shapes[prefix + "mlp.down_proj.weight"] = (d, f)
        shapes["model.norm.weight"] = (d,)
        if not self.tied:
            shapes[HEAD] = (v, d)
        return shapes

    def _vision(self) -> dict[str, tuple[int, ...]]:
        c = self.vision
        d, f, merged = c["hidden_size"], c["intermediate_size"], c["hidden_size"] * c["spatial_merge_size"] ** 2
        patch = (c["in_channels"], c["temporal_patch_size"], c["patch_size"], c["patch_size"])
        shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (d, *patch)}
        for block in range(c["depth"]):
            prefix = f"visual.blocks.{block}."
            shapes[prefix + "norm1.weight"] = shapes[prefix + "norm2.weight"] = (d,)
            linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)}
            linears |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
            for name, shape in linears.items():
                shapes[f"{prefix}{name}.weight"] = shape
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        shapes["visual.merger.ln_q.weight"] = (d,)
        for name, shape in (("0", (merged, merged)), ("2", (c["out_hidden_size"], merged))):
            shapes[f"visual.merger.mlp.{name}.weight"] = shape
            shapes[f"visual.merger.mlp.{name}.bias"] = shape[:1]
        return shapes


def read_shape(config: dict[str, Json], label: str) -> DenseShape:
    """Read the shapes from a `config.json`, nested or flat, of a dense or a two-branch model.

    Args:
        config: the parsed file.
        label: names it in errors.
    Raises:
        CheckpointError: a field is missing or no number that a model could have.
    """
    text, vision = config.get("text_config", config), config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(
            f"{label}: 'text_config' and 'vision_config' must be objects. Is this a Qwen2.5-VL config?"
        )
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = {name: _size(text, name, None, label) for name in names}
    key_value_heads = _size(text, "num_key_value_heads", sizes["num_attention_heads"], label)
    seen = {name: _size(vision, name, default, label) for name, default in _VISION_DEFAULTS.items()}
    channels = "in_channels" if "in_channels" in vision else "in_chans"
    seen["in_channels"] = _size(vision, channels, 3, label)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    numbers: dict[str, Json] = {name: text.get(name, default) for name, default in _TEXT_NUMBERS.items()}
    numbers["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", 1000000.0))
    numbers["mrope_section"] = rope.get("mrope_section")
    numbers |= {f"vision_config.{name}": vision.get(name, default) for name, default in _VISION_NUMBERS.items()}
    numbers |= {name: config.get(name, default) for name, default in _TOKEN_IDS.items()}
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    return DenseShape(**sizes, num_key_value_heads=key_value_heads, tied=bool(tied), vision=seen, numbers=numbers)


def _size(config: dict[str, Json], name: str, default: int | None, label: str) -> int:
    value = config.get(name, default)
    # above 2**24 no real model has any of them, and products stay within 64 bits
    if type(value) is not int or not 0 < value <= 2**24 or (name in ("depth", "num_hidden_layers") and value > 2**12):
        raise CheckpointError(f"{label}: {name!r} must be a positive whole number of sensible size; found {value!r}.")
    return value
