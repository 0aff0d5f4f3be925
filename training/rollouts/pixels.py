"""Pixel values back to pictures: what a server is sent is what the policy sees, to the bit.

The picture of a prompt is taken from its processed patches and not from its file: it is already turned, flattened over
white and resized as our processor does, so that a server's own settings cannot make another picture of it, and images
that tools returned need no file.
"""

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from metis_home.errors import EngineError

from .types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

# How far a value may lie from a whole number: float32 normalisation is exact to 1e-4 of a step of 8 bits.
_MAX_OFFSET = 0.05


def pictures(prompt: Prompt, image_processor: Any) -> list[Image.Image]:
    """The images of a prompt, RGB, in order.

    Raises:
        EngineError: pixel values that are no normalised 8-bit pictures of this image processor.
    """
    if prompt.pixel_values is None or prompt.image_grid_thw is None:
        return []
    if not (image_processor.do_rescale and image_processor.do_normalize):
        raise EngineError(
            "the image processor neither rescales nor normalises: its pixel values cannot be sent to a server"
        )
    grids = prompt.image_grid_thw.tolist()
    parts = prompt.pixel_values.float().cpu().split([time * height * width for time, height, width in grids])
    return [
        _picture(part, height, width, image_processor) for part, (_, height, width) in zip(parts, grids, strict=True)
    ]


def as_data_url(picture: Image.Image) -> str:
    """A picture as a `data:` URL, PNG: without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def collapse_images(prompt: Prompt, image_token_id: int, merge_size: int) -> list[int]:
    """The prompt's ids with one image token per image, as an engine wants them that expands images itself.

    Raises:
        EngineError: a run of image tokens that is not as long as its image says.
    """
    grids = [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist()
    lengths = iter(time * height * width // merge_size**2 for time, height, width in grids)
    ids, place, used = [], 0, 0
    while place < len(prompt.input_ids):
        token = prompt.input_ids[place]
        length = next(lengths, None) if token == image_token_id else 1
        run = prompt.input_ids[place : place + (length or 0)]
        if length is None or run != [token] * length:
            raise EngineError(
                f"prompt {prompt.id!r}, token {place}: the image tokens do not fit its {len(grids)} images {grids}"
            )
        used += token == image_token_id
        ids.append(token)
        place += length
    if used != len(grids):
        raise EngineError(f"prompt {prompt.id!r} has image tokens for {used} images, and brings {len(grids)}")
    return ids


def _picture(patches: "Tensor", height: int, width: int, image_processor: Any) -> Image.Image:
    """One image from its patches (height * width, channels * time * p * p), merged ones beside each other."""
    size, merge, frames = image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size
    blocks = patches.reshape(height // merge, width // merge, merge, merge, -1, frames, size, size)
    # (h, w, i, j, channel, time, p, q) -> (h i p, w j q, channel); a still image fills all frames alike
    values = blocks[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, -1)
    mean, deviation = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    levels = (values * deviation + mean) / image_processor.rescale_factor
    whole = levels.round()
    if (levels - whole).abs().max() > _MAX_OFFSET or whole.min() < 0 or whole.max() > 255:
        raise EngineError("pixel values of a prompt are no normalised 8-bit picture; was another image processor used?")
    return Image.fromarray(whole.to(torch.uint8).numpy())
