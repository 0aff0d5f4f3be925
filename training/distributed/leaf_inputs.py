"""ZeRO-3 and FFNs whose input needs no gradient: the first layer's, where little more than a branch trains.

`deepspeed/zero3.json` declares the FFN of a layer a leaf: DeepSpeed gathers both its branches at once, and frees them and
reduces their gradients in a full backward hook. PyTorch runs such a hook *before* the module's backward where none of
the module's inputs requires a gradient. The weights are then gone when backward needs them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...branch_mlp import MetisHomeMLP


def require_leaf_gradients(model: nn.Module) -> None:
    """Let the input of every two-branch FFN require a gradient in training, if nothing before it does.

    That costs the gradient of one FFN's input and nothing else. To be called before DeepSpeed takes the model.
    """
    for module in model.modules():
        if isinstance(module, MetisHomeMLP):
            module.register_forward_pre_hook(_require_gradient, prepend=True)


def _require_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x_BTD: Tensor = args[0]
    if x_BTD.requires_grad or not torch.is_grad_enabled():
        return None
    return (x_BTD.detach().requires_grad_(), *args[1:])
