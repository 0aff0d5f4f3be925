"""A byte-level tokenizer with Qwen2.5-VL's special tokens, and directories that hold a processor."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Qwen2.5-VL's format, shortened to what the tests use.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What a published Qwen2.5-VL directory has in preprocessor_config.json.
HUB_IMAGE_SETTINGS = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token: any text round-trips, and nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_directory(
    path: Path,
    *,
    processor_class: str | None = None,
    image_settings: dict | None = None,
    config: dict | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write what a hub directory holds beside the weights; a part is left out where its argument is None."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(chat_template).save_pretrained(path)
    if image_settings is not None:
        naming = {} if processor_class is None else {"processor_class": processor_class}
        (path / "preprocessor_config.json").write_text(json.dumps({**image_settings, **naming}))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if processor_class is not None:
        tokenizer_config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(
            json.dumps({**tokenizer_config, "processor_class": processor_class})
        )
    return path


def model_fields(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Configuration of a tiny model, dense or two-branch, for this tokenizer."""
    from tests.model.pico import TEXT, VISION

    token_id = tokenizer.convert_tokens_to_ids
    ends = {"eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>"), "bos_token_id": None}
    return {
        "text_config": {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 4096, **ends},
        "vision_config": {**VISION, "spatial_merge_size": 2},
        **{f"{kind}_token_id": token_id(f"<|{kind}_pad|>") for kind in ("image", "video")},
        **{f"vision_{side}_token_id": token_id(f"<|vision_{side}|>") for side in ("start", "end")},
    }


def write_model(path: Path, *, seed: int = 0, router_trained: bool = True) -> Path:
    """Write a tiny random two-branch model with its processor: everything that answers a question."""
    import torch
    from transformers import Qwen2VLImageProcessorPil

    from metis_home import MetisHomeConfig, MetisHomeForConditionalGeneration, MetisHomeProcessor

    processor = MetisHomeProcessor(Qwen2VLImageProcessorPil(), tiny_tokenizer())
    token_id = processor.tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    model = MetisHomeForConditionalGeneration(
        MetisHomeConfig(**model_fields(processor.tokenizer), router_trained=router_trained)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # decisive logits: greedy text does not hang on rounding
    model.generation_config.suppress_tokens = [token_id(token) for token in SPECIAL_TOKENS if token != "<|im_end|>"]
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def write_dense_model(path: Path) -> Path:
    """Write a tiny random dense Qwen2.5-VL, as a hub directory holds it."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    write_directory(path, processor_class="Qwen2_5_VLProcessor", image_settings=HUB_IMAGE_SETTINGS)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**model_fields(tiny_tokenizer()))).save_pretrained(path)
    return path
