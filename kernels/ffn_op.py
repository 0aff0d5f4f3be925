"""The branch FFN as `torch.library` operators: `metis_home::branch_ffn` and `metis_home::branch_ffn_backward`.

Functional, with fakes and autograd, so `torch.compile(fullgraph=True)` sees one node and no branch of Python. What runs
inside is chosen at run time, from the device and the row count of the call:

    reference   `reference.py`; the CPU implementation
    slices      `slices.py`: cuBLAS per run + fused activation; needs the runs on the host
    grouped     `grouped.py`: persistent grouped GEMMs over a tile plan made on the device
    decode      `decode.py`: weight streaming for at most 128 rows; forward only, keeps nothing for a backward

Shapes: N rows, D hidden, F ffn, S ids of `rows_per_id` rows each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .interpreter import INTERPRETING
from .launch_table import table_for
from .reference import ExpertWeights
from .rows import unflatten_runs

IMPLEMENTATIONS = ("auto", "reference", "slices", "grouped", "decode")
MAX_DECODE_ROWS = 128


def _resolve(implementation: str, direction: str, x_ND: Tensor, features: int, knows_runs: bool, keep: bool) -> str:
    """Name the implementation to run."""
    if implementation != "auto":
        return implementation
    if x_ND.device.type == "cpu" and not INTERPRETING:
        return "reference"
    rows, hidden = x_ND.shape
    choice = table_for(x_ND.device).find(direction, hidden, features, x_ND.dtype, rows)
    if choice == "decode" and (keep or rows > MAX_DECODE_ROWS):
        choice = "grouped"
    # Without the runs, cuBLAS would need to wait for the device to learn them.
    return "grouped" if choice == "slices" and not knows_runs else choice


def _experts(weights: Sequence[Tensor]) -> tuple[ExpertWeights, ExpertWeights]:
    return ExpertWeights(*weights[:3]), ExpertWeights(*weights[3:])


@torch.library.custom_op("metis_home::branch_ffn", mutates_args=())
def branch_ffn(
    x_ND: Tensor,
    gate0_FD: Tensor,
    up0_FD: Tensor,
    down0_DF: Tensor,
    gate1_FD: Tensor,
    up1_FD: Tensor,
    down1_DF: Tensor,
    branch_ids_S: Tensor,
    rows_per_id: int,
    runs: Sequence[int],
    residual_ND: Tensor | None,
    keep: bool,
    empty_gradient: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Send each row through the FFN of its branch; see `dispatch.branch_ffn`.

    Args:
        runs: flattened (branch, start, end) triples if the host knows the runs, else empty.
        keep: return the pre-activations for a backward.
        empty_gradient: `zeros` or `none`; read by the backward.
    Returns:
        (y_ND, gate_NF, up_NF); the last two empty unless `keep`.
    """
    experts = _experts((gate0_FD, up0_FD, down0_DF, gate1_FD, up1_FD, down1_DF))
    known_runs = unflatten_runs(list(runs))
    features = gate0_FD.shape[0]
    chosen = _resolve(implementation, "forward", x_ND, features, bool(known_runs), keep)
    if chosen not in IMPLEMENTATIONS or (chosen == "decode" and (keep or x_ND.shape[0] > MAX_DECODE_ROWS)):
        raise ValueError(
            f"implementation {chosen!r} cannot take {x_ND.shape[0]} rows with keep={keep}; "
            f"choose one of {IMPLEMENTATIONS}, decode for at most {MAX_DECODE_ROWS} rows and keep=False"
        )
    if x_ND.shape[0] == 0:
        columns = features if keep else 0
        return torch.empty_like(x_ND), x_ND.new_empty(0, columns), x_ND.new_empty(0, columns)

    gate_NF: Tensor | None
    up_NF: Tensor | None
    if chosen == "reference":
        y_ND, gate_NF, up_NF = reference.branch_ffn_forward(x_ND, experts, branch_ids_S, rows_per_id, residual_ND)
    elif chosen == "slices":
        from . import slices

        y_ND, gate_NF, up_NF = slices.forward(x_ND, experts, known_runs, residual_ND, keep)
    elif chosen == "grouped":
        from . import grouped

        y_ND, gate_NF, up_NF = grouped.forward(x_ND, experts, branch_ids_S, rows_per_id, residual_ND, keep)
    else:
        from . import decode

        y_ND, gate_NF, up_NF = decode.forward(x_ND, experts, branch_ids_S, rows_per_id, residual_ND), None, None
    if not keep or gate_NF is None or up_NF is None:
        return y_ND, x_ND.new_empty(0, 0), x_ND.new_empty(0, 0)
    return y_ND, gate_NF, up_NF


@branch_ffn.register_fake
def _(
    x_ND,
    gate0_FD,
    up0_FD,
    down0_DF,
    gate1_FD,
    up1_FD,
    down1_DF,
    branch_ids_S,
    rows_per_id,
    runs,
    residual_ND,
    keep,
    empty_gradient,
    implementation,
):
    shape = (x_ND.shape[0], gate0_FD.shape[0]) if keep else (0, 0)
    return torch.empty_like(x_ND), x_ND.new_empty(shape), x_ND.new_empty(shape)


@torch.library.custom_op("metis_home::branch_ffn_backward", mutates_args=())
def branch_ffn_backward(
    grad_y_ND: Tensor,
    x_ND: Tensor,
    gate0_FD: Tensor,
    up0_FD: Tensor,
    down0_DF: Tensor,
    gate1_FD: Tensor,
    up1_FD: Tensor,
    down1_DF: Tensor,
    branch_ids_S: Tensor,
    rows_per_id: int,
    runs: Sequence[int],
    gate_NF: Tensor | None,
    up_NF: Tensor | None,
    needs: Sequence[bool],
    implementation: str,
) -> list[Tensor]:
    """Gradients of `branch_ffn`.

    Args:
        gate_NF, up_NF: the kept pre-activations, or None to recompute them from X.
        needs: for x and the six weights, in order, whether the gradient is wanted. Nothing is launched for the others.
    Returns:
        The wanted gradients, in that order; exactly 0 for an expert without rows.
    """
    weights = (gate0_FD, up0_FD, down0_DF, gate1_FD, up1_FD, down1_DF)
    experts = _experts(weights)
    known_runs = unflatten_runs(list(runs))
    chosen = _resolve(implementation, "backward", x_ND, gate0_FD.shape[0], bool(known_runs), True)
    if x_ND.shape[0] == 0:
        return [torch.zeros_like(tensor) for tensor, need in zip((x_ND, *weights), needs, strict=True) if need]
    if chosen == "reference":
        grad_x_ND, (non_thinking, thinking) = reference.branch_ffn_backward(
            grad_y_ND, x_ND, experts, branch_ids_S, rows_per_id, gate_NF, up_NF
        )
        gradients = (grad_x_ND, *non_thinking, *thinking)
        return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]
    if chosen == "slices":
        return _slices_backward(grad_y_ND, x_ND, experts, known_runs, gate_NF, up_NF, needs)
    from . import grouped

    return grouped.backward(grad_y_ND, x_ND, experts, branch_ids_S, rows_per_id, gate_NF, up_NF, needs)


def _slices_backward(grad_y_ND, x_ND, experts, runs, gate_NF, up_NF, needs) -> list[Tensor]:
    from . import slices

    need_x, *need_weights = needs
    grad_x_ND, grad_gate_NF, grad_up_NF, a_NF = slices.input_gradients(
        grad_y_ND, x_ND, experts, runs, gate_NF, up_NF, need_x
    )
    gradients = [] if grad_x_ND is None else [grad_x_ND]
    pairs = ((grad_gate_NF, x_ND), (grad_up_NF, x_ND), (grad_y_ND, a_NF))
    for index, need in enumerate(need_weights):
        if need:
            grad_NO, input_NI = pairs[index % 3]
            gradients.append(slices.weight_gradient(grad_NO, input_NI, runs, index // 3))
    return gradients


@branch_ffn_backward.register_fake
def _(
    grad_y_ND,
    x_ND,
    gate0_FD,
    up0_FD,
    down0_DF,
    gate1_FD,
    up1_FD,
    down1_DF,
    branch_ids_S,
    rows_per_id,
    runs,
    gate_NF,
    up_NF,
    needs,
    implementation,
):
    tensors = (x_ND, gate0_FD, up0_FD, down0_DF, gate1_FD, up1_FD, down1_DF)
    return [torch.empty_like(tensor) for tensor, need in zip(tensors, needs, strict=True) if need]


def _keep_for_backward(ctx, inputs, output) -> None:
    x_ND, *weights, ids_S, rows_per_id, runs, residual_ND, keep, empty_gradient, implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_ND, *weights, ids_S, *(output[1:] if keep else ()))
    ctx.rows_per_id, ctx.runs, ctx.implementation = rows_per_id, runs, implementation
    ctx.has_residual, ctx.empty_gradient = residual_ND is not None, empty_gradient


def _backward(ctx, grad_y_ND, _grad_gate, _grad_up):
    if grad_y_ND is None:
        return (None,) * 14
    x_ND, *weights, ids_S = ctx.saved_tensors[:8]
    gate_NF, up_NF = ctx.saved_tensors[8:] or (None, None)
    needs = list(ctx.needs_input_grad[:7])
    if ctx.empty_gradient == "none" and ctx.runs:
        used = set(ctx.runs[::3])
        needs[1:] = [need and index // 3 in used for index, need in enumerate(needs[1:])]
    gradients: list[Tensor | None] = [None] * 7
    if any(needs):
        implementation = "auto" if ctx.implementation == "decode" else ctx.implementation
        wanted = iter(
            branch_ffn_backward(
                grad_y_ND.contiguous(),
                x_ND,
                *weights,
                ids_S,
                ctx.rows_per_id,
                ctx.runs,
                gate_NF,
                up_NF,
                needs,
                implementation,
            )
        )
        gradients = [next(wanted) if need else None for need in needs]
    grad_residual_ND = grad_y_ND if ctx.has_residual else None
    return *gradients, None, None, None, grad_residual_ND, None, None, None


branch_ffn.register_autograd(_backward, setup_context=_keep_for_backward)
