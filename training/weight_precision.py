"""Weights that train in 16 bits lose the small steps of fine-tuning."""

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


def warn_of_coarse_weights(model: nn.Module) -> None:
    """Log a warning if weights train in 16 bits; not needed where DeepSpeed or FSDP keep a copy in 32."""
    coarse = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} - {torch.float32}
    if coarse:
        logger.warning(
            "weights train as %s: steps smaller than about 1/256 of a weight (bfloat16) are rounded away. Load the model "
            "in float32 and set bf16=True, or let DeepSpeed or FSDP keep a float32 copy.",
            ", ".join(sorted(str(dtype) for dtype in coarse)),
        )
