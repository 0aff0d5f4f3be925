"""A dense Qwen2.5-VL of about a million parameters, with its tokenizer and processor: a hub directory like any other.

The tokenizer is a byte-level BPE made from the families' own texts, so that nearly every word is one token.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .query import CELL, GRID, SIZE

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Words and single digits take the space before them along.
_PIECES = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"

# Qwen2.5-VL's format without its default system message: a prompt of 45 tokens needs no 10 that never change.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_TOKENS = GRID**2  # per 64 x 64 image: a patch is a cell, and nothing is merged
IMAGE_SETTINGS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": SIZE * SIZE,
    "max_pixels": SIZE * SIZE,
    "patch_size": CELL,
    "temporal_patch_size": 1,
    "merge_size": 1,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a tokenizer from `texts`; any other text works too, byte by byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A random dense model for this tokenizer, float32."""
    token_id = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": CELL,
        "spatial_merge_size": 1,
        "temporal_patch_size": 1,
        "window_size": SIZE,  # one window: one attention call per image and block
        "fullatt_block_indexes": [0, 1],
        "out_hidden_size": 128,
        "initializer_range": 0.06,  # a narrow model learns nothing for hundreds of steps from 0.02
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{kind}_token_id": token_id(f"<|{kind}_pad|>") for kind in ("image", "video")},
        **{f"vision_{side}_token_id": token_id(f"<|vision_{side}|>") for side in ("start", "end")},
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    ends = {"eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>")}
    for name, value in ends.items():
        setattr(model.generation_config, name, value)
    # A policy that samples an image token breaks the next forward pass: there is no image for it.
    model.generation_config.suppress_tokens = [token_id(t) for t in SPECIAL_TOKENS if t != "<|im_end|>"]
    return model


def save(folder: Path, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what a hub directory of Qwen2.5-VL holds."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_SETTINGS, indent=2) + "\n")
