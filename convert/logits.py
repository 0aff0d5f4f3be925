"""Compare what models compute: the one file of the converter that loads a model (and torch)."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..branch import Branch
from ..errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

_TEXT_TOKENS = 24
_PATCHES_PER_SIDE = 4


def compare_logits(directory: Path, sources: dict[Branch, Path], exact: dict[Branch, bool]) -> dict[str, float]:
    """Return the largest difference of logits between each branch and its dense source, on one prompt with an image.

    Args:
        directory: a two-branch checkpoint.
        sources: the dense directory of each branch to compare.
        exact: whether the weights are equal bit for bit; then the logits must be, too.
    Raises:
        VerificationError: logits differ although the weights are equal, or are not finite.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from ..modeling import MetisHomeForConditionalGeneration

    found: dict[Branch, Tensor] = {}
    with torch.no_grad():
        model = MetisHomeForConditionalGeneration.from_pretrained(directory, dtype="auto").eval()
        dtype = model.dtype
        for branch in sources:
            found[branch] = model(**_prompt(model.config), branch_ids=int(branch)).logits.float()
        del model  # one model in memory at a time
        differences = {}
        for branch, source in sources.items():
            dense = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=dtype).eval()
            expected = dense(**_prompt(dense.config)).logits.float()
            del dense
            difference = float((found[branch] - expected).abs().max())
            if not difference < float("inf"):
                raise VerificationError(f"branch {branch.label}: the logits are not finite.")
            if exact[branch] and difference != 0.0:
                raise VerificationError(
                    f"branch {branch.label}: logits differ from {source} by up to {difference:g}, although the weights "
                    "are equal. Are the config files?"
                )
            differences[branch.label] = difference
    return differences


def _prompt(config: object) -> dict[str, object]:
    """A fixed prompt: an image of 4 x 4 patches, then text; the same tensors for every model of one shape."""
    import torch

    text, vision = config.text_config, config.vision_config  # type: ignore[attr-defined]
    special = {
        config.image_token_id,  # type: ignore[attr-defined]
        config.video_token_id,  # type: ignore[attr-defined]
        config.vision_start_token_id,  # type: ignore[attr-defined]
        config.vision_end_token_id,  # type: ignore[attr-defined]
    }
    words = [(7919 * i + 13) % text.vocab_size for i in range(_TEXT_TOKENS + len(special) * 4)]
    words = [word for word in words if word not in special][:_TEXT_TOKENS]
    images = _PATCHES_PER_SIDE**2 // vision.spatial_merge_size**2
    start, image, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id  # type: ignore[attr-defined]
    ids = torch.tensor([[*words[:4], start, *[image] * images, end, *words[4:]]])
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.sin(torch.arange(_PATCHES_PER_SIDE**2 * width, dtype=torch.float32)).view(-1, width)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, _PATCHES_PER_SIDE, _PATCHES_PER_SIDE]]),
    }
