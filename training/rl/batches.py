"""Micro-batches as tensors: right-padded, positions given, each prompt's pixels once.

Right padding needs no attention mask: no token sees what comes after it. So the attention runs on its causal fast path.

Shapes: B rows, T tokens; pixel values are (patches, D).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..rollouts.positions import RopeIndex, rollout_positions
from ..rollouts.types import Rollout

IGNORE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """What one forward needs, and where the policy's tokens are."""

    inputs: dict[str, Tensor | int]
    """Arguments of the model's forward, without `labels`."""
    mask_BT: Tensor
    """1.0 at the policy's tokens."""
    labels: Tensor
    """(B, T): -100 at prompt tokens and only there, which is how the router finds them."""
    starts: list[int]
    """Length of each row's prompt."""
    image_order: list[int]
    """Which of the images in `pixel_values` stands at each place of the batch."""

    def to_columns(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Put one list of numbers per row (one per completion token) to their columns, (B, T) float32."""
        columns_BT = torch.zeros(self.mask_BT.shape)
        for row, (start, numbers) in enumerate(zip(self.starts, values, strict=True)):
            columns_BT[row, start : start + len(numbers)] = torch.tensor(numbers)
        return columns_BT.to(self.mask_BT.device)


def collate_rollouts(
    rollouts: Sequence[Rollout],
    rope_index: RopeIndex,
    device: torch.device,
    *,
    with_tokens: Sequence[bool] | None = None,
) -> RolloutBatch:
    """Make the tensors of one forward.

    Args:
        rollouts: all answered by dense models, or all with a branch.
        rope_index: the model's `get_rope_index`.
        with_tokens: false where a rollout's tokens take no part in the loss.
    """
    longest = max(len(rollout) for rollout in rollouts)
    shape = (len(rollouts), longest)
    input_ids, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask, positions = torch.zeros(shape), torch.zeros((3, *shape), dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt), len(rollout)
        input_ids[row, :end] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        labels[row, :start] = IGNORE
        positions[:, row, :end] = rollout_positions(rollout, rope_index)
        if with_tokens is None or with_tokens[row]:
            mask[row, start:end] = torch.tensor(rollout.loss_mask, dtype=mask.dtype)
    inputs: dict[str, Tensor | int] = {"input_ids": input_ids.to(device), "position_ids": positions.to(device)}
    pixels, grids, order = _images(rollouts)
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(device)
        inputs["image_grid_thw"] = torch.cat(grids).to(device)
    branches = [rollout.branch for rollout in rollouts]
    if branches[0] is not None:
        inputs["branch_ids"] = branches[0] if len(set(branches)) == 1 else torch.tensor(branches)
    return RolloutBatch(
        inputs=inputs,
        mask_BT=mask.to(device),
        labels=labels.to(device),
        starts=[len(rollout.prompt) for rollout in rollouts],
        image_order=order,
    )


@contextmanager
def shared_images(model: nn.Module, image_order: Sequence[int]) -> Iterator[None]:
    """Within it, the vision tower sees each image once, and its features go to every place that shows the image."""
    if list(image_order) == list(range(len(image_order))):
        yield
        return
    owner: Any = next(
        module for module in model.modules() if hasattr(module, "get_image_features") and "visual" in module._modules
    )
    original = owner.get_image_features

    def features(*args: object, **kwargs: object):
        output = original(*args, **kwargs)
        sizes = [len(part) for part in output.pooler_output]
        output.pooler_output = tuple(output.pooler_output[image] for image in image_order)
        deepstack = getattr(output, "deepstack_features", None)
        if deepstack is not None:
            output.deepstack_features = [_reorder(layer, sizes, image_order) for layer in deepstack]
        return output

    owner.get_image_features = features
    try:
        yield
    finally:
        del owner.get_image_features


def _reorder(layer: Tensor | Sequence[Tensor], sizes: list[int], order: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    """Features of one deepstack layer: per image, or of all images in one tensor (older transformers)."""
    if isinstance(layer, Tensor):
        parts = layer.split(sizes)
        return torch.cat([parts[image] for image in order])
    return tuple(layer[image] for image in order)


def _images(rollouts: Sequence[Rollout]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Pixels and grids, a prompt's once, and the number of the image at each place in the order of the tokens."""
    pixels: list[Tensor] = []
    grids: list[Tensor] = []
    order: list[int] = []
    count = 0
    first_of: dict[int, int] = {}
    for rollout in rollouts:
        for pixel_values, grid, key in (
            (rollout.prompt.pixel_values, rollout.prompt.image_grid_thw, id(rollout.prompt)),
            (rollout.observation_pixel_values, rollout.observation_grid_thw, None),
        ):
            if pixel_values is None or grid is None:
                continue
            if key is None or key not in first_of:
                if key is not None:
                    first_of[key] = count
                first = count
                pixels.append(pixel_values)
                grids.append(grid)
                count += len(grid)
            else:
                first = first_of[key]
            order += range(first, first + len(grid))
    return pixels, grids, order
