"""A tiny random two-branch model, its dense twins, and batches of rows with text and images.

The twin of a branch is a stock Qwen2.5-VL with exactly the weights of that branch: the oracle of most tests.
"""

from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metis_home import Branch, MetisHomeConfig, MetisHomeForConditionalGeneration
from metis_home.names import dense_name_of

VOCABULARY = 99
IMAGE, VIDEO, VISION_START, VISION_END = 3, 4, 5, 6
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 1,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 32,
    "in_channels": 3,
}
PATCH_VALUES = 3 * 2 * 14 * 14


def pico_config(**overrides) -> MetisHomeConfig:
    text = {**TEXT, **overrides.pop("text", {})}
    return MetisHomeConfig(text_config=text, vision_config=dict(VISION), **SPECIAL, router_trained=True, **overrides)


def pico_model(seed: int = 0, **overrides) -> MetisHomeForConditionalGeneration:
    """A model whose branches, and whose logits, differ decisively."""
    torch.manual_seed(seed)
    model = MetisHomeForConditionalGeneration(pico_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return quiet(model)


def quiet(model):
    """Never stop early, and never sample an image token (a random model would)."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = list(SPECIAL.values())
    return model


def dense_twin(model: MetisHomeForConditionalGeneration, branch: Branch | int) -> Qwen2_5_VLForConditionalGeneration:
    """The stock dense model that `model` must equal on `branch`."""
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "tie_word_embeddings": model.config.tie_word_embeddings},
        vision_config=dict(VISION),
        tie_word_embeddings=model.config.tie_word_embeddings,
        **SPECIAL,
    )
    twin = Qwen2_5_VLForConditionalGeneration(config).eval()
    names = {name: dense_name_of(name, branch) for name in model.state_dict()}
    state = {names[name]: tensor for name, tensor in model.state_dict().items() if names[name] is not None}
    twin.load_state_dict(state)
    twin.set_attn_implementation(model.config._attn_implementation)
    return quiet(twin.to(model.dtype))


@dataclass(frozen=True)
class Row:
    """One unpadded query. `grids` are (time, height, width) in patches, of its images or of its videos."""

    ids: list[int]
    patches: torch.Tensor | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    is_video: bool = False

    @property
    def types(self) -> list[int]:
        return [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in self.ids]


def row(num_text: int, *grids: tuple[int, int, int], seed: int = 0, is_video: bool = False) -> Row:
    """`num_text` random tokens with one image (or video) per grid after the second of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (num_text,), generator=generator).tolist()
    images = []
    for time, height, width in grids:
        images += [VISION_START, *[VIDEO if is_video else IMAGE] * (time * height * width), VISION_END]
    count = sum(time * height * width for time, height, width in grids)
    patches = torch.randn(count, PATCH_VALUES, generator=generator) if count else None
    return Row(ids[:2] + images + ids[2:], patches, grids, is_video)


def collate(rows: list[Row], side: str = "left") -> dict[str, torch.Tensor]:
    """Pad and stack rows as a processor does."""
    longest = max(len(item.ids) for item in rows)

    def padded(values: list[int]) -> list[int]:
        padding = [0] * (longest - len(values))
        return padding + values if side == "left" else values + padding

    batch = {
        "input_ids": torch.tensor([padded(item.ids) for item in rows]),
        "attention_mask": torch.tensor([padded([1] * len(item.ids)) for item in rows]),
        "mm_token_type_ids": torch.tensor([padded(item.types) for item in rows]),
    }
    for is_video, patches_name, grids_name in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [item for item in rows if item.grids and item.is_video == is_video]
        if chosen:
            batch[patches_name] = torch.cat([item.patches for item in chosen if item.patches is not None])
            batch[grids_name] = torch.tensor([grid for item in chosen for grid in item.grids])
    return batch


IMAGE_ROWS = [
    row(9, (1, 2, 4), seed=1),
    row(5, seed=2),
    row(7, (1, 4, 4), (1, 2, 2), seed=3),
    row(12, (1, 2, 2), seed=4),
]
VIDEO_ROWS = [
    row(9, (2, 2, 2), seed=1, is_video=True),
    row(5, seed=2),
    row(7, (1, 2, 2), seed=3),
    row(6, (3, 2, 2), seed=4, is_video=True),
]
TEXT_ROWS = [row(9, seed=1), row(5, seed=2), row(7, seed=3), row(12, seed=4)]
MIX = [1, 0, 0, 1]
