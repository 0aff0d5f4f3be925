"""Pico dense Qwen2.5-VL checkpoints of random bytes: any layout, any shards, written without the code under test."""

import hashlib
import json
import random
import struct
from pathlib import Path

LAYERS = 2
HIDDEN, FFN, VOCAB, VISION, VISION_FFN = 8, 12, 32, 16, 20
CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "dtype": "float32",
    "image_token_id": 5,
    "model_type": "qwen2_5_vl",
    "text_config": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "model_type": "qwen2_5_vl_text",
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"mrope_section": [1, 1, 0], "rope_theta": 10000.0, "rope_type": "default"},
        "vocab_size": VOCAB,
    },
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "video_token_id": 6,
    "vision_config": {
        "depth": 1,
        "fullatt_block_indexes": [0],
        "hidden_size": VISION,
        "in_channels": 3,
        "intermediate_size": VISION_FFN,
        "model_type": "qwen2_5_vl",
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
    },
    "vision_end_token_id": 4,
    "vision_start_token_id": 3,
}
WIDTH = {"F32": 4, "BF16": 2, "F16": 2}


def shapes(*, tied: bool = False, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """{hub name: shape}, written down by hand (the code under test derives them from the config)."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        p = f"model.layers.{layer}."
        found |= {p + "input_layernorm.weight": (HIDDEN,), p + "post_attention_layernorm.weight": (HIDDEN,)}
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            found |= {f"{p}self_attn.{name}_proj.weight": (rows, HIDDEN), f"{p}self_attn.{name}_proj.bias": (rows,)}
        found[p + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found |= {p + "mlp.gate_proj.weight": (FFN, HIDDEN), p + "mlp.up_proj.weight": (FFN, HIDDEN)}
        found[p + "mlp.down_proj.weight"] = (HIDDEN, FFN)
    if not tied:
        found["lm_head.weight"] = (VOCAB, HIDDEN)
    b = "visual.blocks.0."
    found |= {"visual.patch_embed.proj.weight": (VISION, 3, 2, 4, 4)}
    found |= {b + "norm1.weight": (VISION,), b + "norm2.weight": (VISION,)}
    for name, rows, columns in (
        ("attn.qkv", 3 * VISION, VISION),
        ("attn.proj", VISION, VISION),
        ("mlp.gate_proj", VISION_FFN, VISION),
        ("mlp.up_proj", VISION_FFN, VISION),
        ("mlp.down_proj", VISION, VISION_FFN),
    ):
        found |= {f"{b}{name}.weight": (rows, columns), f"{b}{name}.bias": (rows,)}
    found["visual.merger.ln_q.weight"] = (VISION,)
    found |= {"visual.merger.mlp.0.weight": (4 * VISION, 4 * VISION), "visual.merger.mlp.0.bias": (4 * VISION,)}
    found |= {"visual.merger.mlp.2.weight": (HIDDEN, 4 * VISION), "visual.merger.mlp.2.bias": (HIDDEN,)}
    return found


def numbers(name: str, seed: int, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Finite numbers near 0 that depend on name and seed only."""
    rng = random.Random(hashlib.sha256(f"{name}{seed}".encode()).digest())
    count = 1
    for length in shape:
        count *= length
    values = [rng.gauss(0.0, 0.3) for _ in range(count)]
    if dtype == "F16":
        return struct.pack(f"<{count}e", *values)
    data = struct.pack(f"<{count}f", *values)
    if dtype == "F32":
        return data
    return b"".join(data[4 * i + 2 : 4 * i + 4] for i in range(count))


def tensors(
    *, shared_seed: int = 0, ffn_seed: int = 0, tied: bool = False, dtype: str = "F32"
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{hub name: (dtype, shape, bytes)} of a dense model."""
    made = {}
    for name, shape in shapes(tied=tied).items():
        own = name.startswith("model.layers.") and ".mlp." in name
        made[name] = (dtype, shape, numbers(name, ffn_seed if own else shared_seed, dtype, shape))
    return made


def module_name(name: str) -> str:
    """The name in the newer layout."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def write_safetensors(path: Path, content: dict, metadata: dict | None = None, pad: int = 0) -> None:
    """Write a file in exactly this order."""
    header: dict = {"__metadata__": metadata} if metadata is not None else {}
    position = 0
    for name, (dtype, shape, data) in content.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in content.values()))


def read_safetensors(path: Path) -> dict:
    """{name: (dtype, shape, bytes)}."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (e["dtype"], tuple(e["shape"]), data[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in header.items()
    }


def read_all(directory: Path) -> dict:
    """All tensors of a directory."""
    found: dict = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_safetensors(path)
    return found


def write_dense(
    directory: Path,
    content: dict | None = None,
    *,
    groups: list[list[str]] | None = None,
    layout: str = "hub",
    config: dict | None = None,
    extras: bool = True,
    **how: object,
) -> Path:
    """Write a dense checkpoint; `groups` are the hub names of each shard (None: one file)."""
    directory.mkdir(parents=True)
    content = tensors(**how) if content is None else content  # type: ignore[arg-type]
    spell = module_name if layout == "module" else (lambda name: name)
    config = dict(CONFIG, tie_word_embeddings="lm_head.weight" not in content) if config is None else config
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if groups is None:
        write_safetensors(directory / "model.safetensors", {spell(n): t for n, t in content.items()}, {"format": "pt"})
    else:
        weight_map = {}
        for number, names in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            write_safetensors(directory / file, {spell(n): content[n] for n in names}, {"format": "pt"}, pad=number % 5)
            weight_map |= {spell(name): file for name in names}
        size = sum(len(data) for _, _, data in content.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if extras:
        (directory / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": 2}')
        (directory / "preprocessor_config.json").write_text(
            '{"processor_class":  "Qwen2_5_VLProcessor", "min_pixels": 4}'
        )
        (directory / "tokenizer.json").write_text('{"version": "1.0"}')
        (directory / "chat_template.jinja").write_text("{{ messages }}")
        (directory / "LICENSE").write_text("a licence")
        (directory / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# dense\n")
    return directory


def snapshot(directory: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file below."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
