"""The grouped backend: forward and backward put together from the grouped GEMMs. Same functions as `slices.py`.

    forward    plan, gate_up, down                                            keeps X, gate, up: 2 F + D values per row
    backward   plan, grad_a with dswiglu in its epilogue, grad_x, 3 x grad_w     or keeps X only and recomputes gate, up

Nothing here looks at the branch ids on the host, so there is no synchronisation and a captured graph replays with
another mix. Shapes: N rows, D hidden, F ffn, S ids.
"""

from collections.abc import Sequence

from torch import Tensor

from .down import down
from .gate_up import gate_up
from .grad_input import grad_a, grad_x
from .grad_weight import grad_weight
from .reference import ExpertWeights


def forward(
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    residual_ND: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y_ND, gate_NF, up_NF); the pre-activations only if `keep`."""
    a_NF, gate_NF, up_NF = gate_up(x_ND, experts, branch_ids_S, rows_per_id, keep=keep)
    return down(a_NF, experts, branch_ids_S, rows_per_id, residual_ND), gate_NF, up_NF


def backward(
    grad_y_ND: Tensor,
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    gate_NF: Tensor | None,
    up_NF: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients of (x, gate0, up0, down0, gate1, up1, down1), in that order.

    Nothing is launched for an unwanted one. An expert without rows gets exact zeros.
    """
    need_x, need_weights = needs[0], needs[1:]
    if gate_NF is None or up_NF is None:
        _, gate_NF, up_NF = gate_up(x_ND, experts, branch_ids_S, rows_per_id, keep=True)
        assert gate_NF is not None
        assert up_NF is not None
    grad_gate_NF, grad_up_NF, a_NF = grad_a(grad_y_ND, gate_NF, up_NF, experts, branch_ids_S, rows_per_id)
    gradients: list[Tensor | None] = [None] * 6
    pairs = ((grad_gate_NF, x_ND), (grad_up_NF, x_ND), (grad_y_ND, a_NF))
    for index, (grad_NO, input_NI) in enumerate(pairs):
        wanted = need_weights[index], need_weights[index + 3]
        gradients[index], gradients[index + 3] = grad_weight(grad_NO, input_NI, branch_ids_S, rows_per_id, wanted)
    if need_x:
        gradients.insert(0, grad_x(grad_gate_NF, grad_up_NF, experts, branch_ids_S, rows_per_id))
    return [gradient for gradient in gradients if gradient is not None]
