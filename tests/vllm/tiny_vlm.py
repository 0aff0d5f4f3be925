"""The smallest Qwen2.5-VL that vLLM runs on a CPU: random weights whose greedy tokens do not hang on rounding."""

import json
from pathlib import Path
from typing import Any

from tests.processing.tiny import HUB_IMAGE_SETTINGS, model_fields, tiny_tokenizer, write_directory

HEAD = 32  # vLLM's attention on a CPU takes heads of 32, 64, ...


def fields() -> dict[str, Any]:
    """Configuration of the model, dense or two-branch."""
    plain = model_fields(tiny_tokenizer())
    text = {
        **plain["text_config"],
        "hidden_size": 4 * HEAD,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,  # more than the tokenizer has, as in published models
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    }
    vision = {**plain["vision_config"], "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    vision |= {"patch_size": 14, "out_hidden_size": 4 * HEAD}
    return {**plain, "text_config": text, "vision_config": vision}


def louder(model: Any, scale: float = 4.0) -> Any:
    """Larger weights, hence decisive logits; biases that are not zero, so that lost ones show."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_dense(path: Path, *, seed: int = 0) -> Path:
    """Write a dense model with its processor, as a hub directory holds it."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    settings = {**HUB_IMAGE_SETTINGS, "min_pixels": 28 * 28, "max_pixels": 112 * 112}
    write_directory(path, processor_class="Qwen2_5_VLProcessor", image_settings=settings)
    torch.manual_seed(seed)
    model = louder(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields())))
    model.save_pretrained(path)
    return path


def image_settings(path: Path) -> dict[str, Any]:
    """What the directory says about images."""
    return json.loads((path / "preprocessor_config.json").read_text())
