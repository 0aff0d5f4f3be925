"""M-RoPE positions of prompts and rollouts, computed once per prompt by the model's own rule.

Shapes: T tokens; positions are (3, T): time, height, width.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .types import Prompt, Rollout

RopeIndex = Callable[..., tuple[Tensor, Tensor]]


def rope_index_of(model: nn.Module) -> RopeIndex:
    """The `get_rope_index` of a model, wrapped or not."""
    return next(
        cast(RopeIndex, module.get_rope_index) for module in model.modules() if hasattr(module, "get_rope_index")
    )


def fill_positions(prompt: Prompt, rope_index: RopeIndex) -> None:
    """Compute `prompt.positions` and `prompt.next_position`, unless they are there."""
    if prompt.positions is not None:
        return
    prompt.positions = _positions(prompt.input_ids, prompt.mm_token_type_ids, _cat(prompt.image_grid_thw), rope_index)
    prompt.next_position = int(prompt.positions.max()) + 1 if len(prompt) else 0


def rollout_positions(rollout: Rollout, rope_index: RopeIndex) -> Tensor:
    """Positions of prompt and completion, (3, T) int64; images that tools returned are counted as images."""
    prompt = rollout.prompt
    fill_positions(prompt, rope_index)
    assert prompt.positions is not None
    if rollout.observation_grid_thw is None:
        first = prompt.next_position
        text = torch.arange(first, first + len(rollout.completion_ids)).expand(3, -1)
        return torch.cat([prompt.positions, text], dim=1)
    types = prompt.mm_token_type_ids + (rollout.observation_types or [0] * len(rollout.completion_ids))
    grids = _cat(prompt.image_grid_thw, rollout.observation_grid_thw)
    return _positions(prompt.input_ids + rollout.completion_ids, types, grids, rope_index)


def _positions(input_ids: list[int], types: list[int], grids: Tensor | None, rope_index: RopeIndex) -> Tensor:
    if grids is None:
        return torch.arange(len(input_ids)).expand(3, -1).clone()
    positions, _ = rope_index(
        torch.tensor([input_ids]), mm_token_type_ids=torch.tensor([types]), image_grid_thw=grids.cpu()
    )
    return positions[:, 0]


def _cat(*grids: Tensor | None) -> Tensor | None:
    present = [grid for grid in grids if grid is not None]
    return torch.cat(present) if present else None
