"""Prompts of the pico model's rows, a tokenizer that prints numbers, and a stock pico Qwen3-VL."""

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from metis_home.training.rollouts.types import Prompt, Sampling
from tests.model.pico import SPECIAL, TEXT, VISION, Row, quiet

SUPPRESS = tuple(SPECIAL.values())


class NumberTokenizer:
    """Each token's text is its number."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(token) for token in ids)


def prompt_of(row: Row, index: int = 0, **columns: object) -> Prompt:
    return Prompt(
        index=index,
        id=f"row:{index}",
        input_ids=list(row.ids),
        mm_token_type_ids=row.types,
        pixel_values=row.patches,
        image_grid_thw=torch.tensor(row.grids) if row.grids else None,
        messages=[{"role": "user", "content": "?"}],
        columns=columns,
    )


def sampling(max_new_tokens: int = 8, **fields) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, suppress_token_ids=SUPPRESS, **fields)


def qwen3_vl(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**TEXT["rope_parameters"], "mrope_interleaved": True}}
    vision = {
        **{
            name: VISION[name] for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
        },
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 1,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **SPECIAL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return quiet(model)
