"""What the model's two classes return: transformers' outputs and the routing beside them.

Shapes: B batch, T tokens, S queries of packed rows.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class MetisHomeModelOutputWithPast(BaseModelOutputWithPast):
    """`router_logits`: (B, 2) float32 where the router ran, (S, 2) for packed rows, else None. `branch_ids`: what the
    layers used."""

    router_logits: Tensor | None = None
    branch_ids: int | Tensor | None = None


@dataclass
class MetisHomeCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` = `lm_loss` + router_loss_weight * `router_loss`, each there when its labels are.

    `router_logits`: (B, 2) float32 where the router ran, (S, 2) for packed rows, else None. `branch_ids`: what the layers
    used, an int or a tensor of shape (B,) or (B, T).
    """

    router_logits: Tensor | None = None
    branch_ids: int | Tensor | None = None
    lm_loss: Tensor | None = None
    router_loss: Tensor | None = None
