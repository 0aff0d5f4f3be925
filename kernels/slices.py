"""The cuBLAS-slices backend: dense matmuls on the rows of each run, in place, and the fused activation between them.

The oracle for speed, and the default wherever a table has not shown something faster: at prefill size, fusion saves at
most about 7 % over it. It needs the runs on the host, which the model has, since it decides there; it then gathers,
scatters and copies nothing. Same functions as `grouped.py`, which needs no look at the ids.

Shapes: N rows, D hidden, F ffn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import ExpertWeights, Run
from .silu_mul import dswiglu, silu_mul


def forward(
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    runs: Sequence[Run],
    residual_ND: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y_ND, gate_NF, up_NF); the pre-activations only if `keep`, else None and freed run by run."""
    y_ND = torch.empty_like(x_ND)
    features = experts[0].gate_FD.shape[0]
    gate_NF = x_ND.new_empty(x_ND.shape[0], features) if keep else None
    up_NF = x_ND.new_empty(x_ND.shape[0], features) if keep else None
    for branch, start, end in runs:
        expert, x = experts[branch], x_ND[start:end]
        gate = torch.mm(x, expert.gate_FD.T, out=None if gate_NF is None else gate_NF[start:end])
        up = torch.mm(x, expert.up_FD.T, out=None if up_NF is None else up_NF[start:end])
        a = silu_mul(gate, up)
        if residual_ND is None:
            torch.mm(a, expert.down_DF.T, out=y_ND[start:end])
        else:
            torch.addmm(residual_ND[start:end], a, expert.down_DF.T, out=y_ND[start:end])
    return y_ND, gate_NF, up_NF


def input_gradients(
    grad_y_ND: Tensor,
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    runs: Sequence[Run],
    gate_NF: Tensor | None,
    up_NF: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(grad_x_ND, grad_gate_NF, grad_up_NF, a_NF): all that the weight gradients need, and dX if `need_x`."""
    shape = (x_ND.shape[0], experts[0].gate_FD.shape[0])
    grad_x_ND = torch.empty_like(x_ND) if need_x else None
    grad_a_NF = x_ND.new_empty(shape)
    recompute = gate_NF is None or up_NF is None
    if gate_NF is None or up_NF is None:
        gate_NF, up_NF = x_ND.new_empty(shape), x_ND.new_empty(shape)
    for branch, start, end in runs:
        expert = experts[branch]
        torch.mm(grad_y_ND[start:end], expert.down_DF, out=grad_a_NF[start:end])
        if recompute:
            torch.mm(x_ND[start:end], expert.gate_FD.T, out=gate_NF[start:end])
            torch.mm(x_ND[start:end], expert.up_FD.T, out=up_NF[start:end])
    grad_gate_NF, grad_up_NF, a_NF = dswiglu(grad_a_NF, gate_NF, up_NF)
    if grad_x_ND is not None:
        for branch, start, end in runs:
            torch.mm(grad_gate_NF[start:end], experts[branch].gate_FD, out=grad_x_ND[start:end])
            grad_x_ND[start:end].addmm_(grad_up_NF[start:end], experts[branch].up_FD)
    return grad_x_ND, grad_gate_NF, grad_up_NF, a_NF


def weight_gradient(grad_NO: Tensor, input_NI: Tensor, runs: Sequence[Run], branch: int) -> Tensor:
    """dW = sum over the rows of `branch` of grad^T input, (O, I); exactly 0 without rows."""
    mine = [run for run in runs if run.branch == branch]
    shape = (grad_NO.shape[1], input_NI.shape[1])
    if not mine:
        return grad_NO.new_zeros(shape)
    if len(mine) == 1:
        return torch.mm(grad_NO[mine[0].start : mine[0].end].T, input_NI[mine[0].start : mine[0].end])
    # Several runs: sum in float32, or every run would round the gradient to 8 bits again.
    wide = torch.float64 if grad_NO.dtype == torch.float64 else torch.float32
    if grad_NO.dtype == wide:
        total = grad_NO.new_zeros(shape)
        for run in mine:
            total.addmm_(grad_NO[run.start : run.end].T, input_NI[run.start : run.end])
        return total
    rows = torch.cat([torch.arange(run.start, run.end, device=grad_NO.device) for run in mine])
    return torch.mm(grad_NO[rows].T, input_NI[rows])
