"""Text-only batches still call the vision tower, so that all ranks do the same work.

Ranks of a distributed run must issue the same collectives in the same order: a rank whose micro-batch holds no image
would leave the vision tower's gradients (DDP) or parameters (FSDP, ZeRO-3) unasked for, and the others wait for ever.
So a batch without images sends one smallest blank image through the tower and adds its features, times 0, to the token
embeddings. The embeddings stay bit for bit what they were; the tower's gradients become zeros instead of missing.

The call stands where a real image's would: inside the model's forward, right after the token embeddings.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class VisionPresence:
    """Makes the forwards of one two-branch model call its vision tower, see the module's head.

    with presence.ensured(batch):
        model(**batch)
    """

    def __init__(self, model: nn.Module) -> None:
        """`model`: a `MetisHomeForConditionalGeneration`, or anything around it that has `get_input_embeddings`."""
        self._tower = next(module for name, module in model.named_modules() if name.endswith("visual"))
        self._embeddings = model.get_input_embeddings()  # type: ignore[operator]

    def is_needed(self, batch: Mapping[str, object]) -> bool:
        """Has this batch no image or video, while the tower trains or its parameters are sharded over ranks?"""
        if batch.get("pixel_values") is not None or batch.get("pixel_values_videos") is not None:
            return False
        parameters = list(self._tower.parameters())
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        return trains or any(
            hasattr(parameter, "ds_id") or hasattr(parameter, "placements") for parameter in parameters
        )

    @contextmanager
    def ensured(self, batch: Mapping[str, object]) -> Iterator[None]:
        """Within it, a forward of `batch` calls the vision tower in any case."""
        if not self.is_needed(batch):
            yield
            return
        handle = self._embeddings.register_forward_hook(self._add_nothing)
        try:
            yield
        finally:
            handle.remove()

    def _add_nothing(self, module: nn.Module, arguments: tuple, embeds: Tensor) -> Tensor:
        pixel_values, grid = self.blank_image(embeds.device)
        features = self._tower(pixel_values, grid_thw=grid)
        features = features if isinstance(features, Tensor) else features.pooler_output
        return embeds + 0 * features.sum().to(embeds.dtype)

    def blank_image(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The smallest image: pixel_values (merge * merge, channels * time * patch * patch) of zeros, grid (1, 3)."""
        config = self._tower.config
        merge = config.spatial_merge_size
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixel_values = torch.zeros(merge * merge, values, dtype=self._tower.dtype, device=device)
        return pixel_values, torch.tensor([[1, merge, merge]], device=device)
