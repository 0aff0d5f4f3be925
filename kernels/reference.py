"""The branch FFN and its plan, in plain PyTorch: what every kernel of this folder must compute.

    y_n = W_down^b ( silu(W_gate^b x_n) * (W_up^b x_n) ),      b = branch of row n

Forward and hand-written backward. Sums are taken in float32 (float64 for float64 input), and every tensor that a
kernel would write to memory is rounded to the dtype of the input exactly where the kernel rounds it: called with
float64 tensors this file is the oracle, called with bfloat16 ones it is the CPU implementation of the custom ops.

Shapes: N rows (B * T, flattened), D hidden, F ffn, S ids; each id covers `rows_per_id` consecutive rows, so
N = S * rows_per_id.
The router's definition is `reference_route.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_BRANCHES = 2


class ExpertWeights(NamedTuple):
    """The three matrices of one branch, as `nn.Linear` holds them: never copied, fused or repacked."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


class Run(NamedTuple):
    """A maximal block of consecutive rows of one branch: rows `start` up to, not including, `end`."""

    branch: int
    start: int
    end: int


class Tile(NamedTuple):
    """Rows `start` up to min(start + block_rows, `end`) of one run; `end` is the run's end."""

    branch: int
    start: int
    end: int


def find_runs(branch_ids_S: Tensor, rows_per_id: int) -> list[Run]:
    """Cut N = S * rows_per_id rows into runs, in row order.

    Waits for the device if `branch_ids_S` is not on the host.
    """
    if branch_ids_S.numel() * rows_per_id == 0:
        return []
    branches, lengths = torch.unique_consecutive(branch_ids_S, return_counts=True)
    ends = (lengths.cumsum(0) * rows_per_id).tolist()
    return [Run(*run) for run in zip(branches.tolist(), [0, *ends[:-1]], ends, strict=True)]


def tile_plan(branch_ids_S: Tensor, rows_per_id: int, block_rows: int) -> list[Tile]:
    """Cut the runs into tiles: all tiles of branch 0 first, then those of branch 1, each in row order.

    There are at most `max_tiles(S, rows_per_id, block_rows)` of them, a bound that needs no look at the ids.
    """
    tiles = [
        Tile(run.branch, start, run.end)
        for run in find_runs(branch_ids_S, rows_per_id)
        for start in range(run.start, run.end, block_rows)
    ]
    return sorted(tiles, key=lambda tile: tile.branch)


def max_tiles(num_ids: int, rows_per_id: int, block_rows: int) -> int:
    """A bound on the number of tiles that holds for every mix: each id ends at most one tile early."""
    num_rows = num_ids * rows_per_id
    return min(num_rows, (num_rows + block_rows - 1) // block_rows + num_ids)


def row_lists(branch_ids_S: Tensor, rows_per_id: int) -> tuple[Tensor, Tensor]:
    """Per branch its rows, ascending (so stable), int64. Concatenated they are the permutation that sorts by branch."""
    branch_N = branch_ids_S.repeat_interleave(rows_per_id)
    non_thinking, thinking = ((branch_N == branch).nonzero(as_tuple=True)[0] for branch in range(NUM_BRANCHES))
    return non_thinking, thinking


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """a = silu(gate) * up with one rounding, at the end; any shape, dtype of `gate`."""
    wide = accumulation_dtype(gate.dtype)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def dswiglu(grad_a: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `silu_mul`, with `a` recomputed in the same pass.

    dgate = da * up * s * (1 + gate * (1 - s)),   dup = da * gate * s,   a = gate * s * up,   s = sigmoid(gate)

    Returns:
        (dgate, dup, a), each the shape and dtype of `gate`.
    """
    wide = accumulation_dtype(gate.dtype)
    grad, g, u = grad_a.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(g)
    silu = g * s
    grad_gate = grad * u * s * (1 + g * (1 - s))
    return grad_gate.to(gate.dtype), (grad * silu).to(gate.dtype), (silu * u).to(gate.dtype)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    # Sum in the accumulation dtype and round once. CPU bfloat16 matmuls may round partial sums.
    wide = accumulation_dtype(left.dtype)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)


def branch_ffn_forward(
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    residual_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Send each row through the FFN of its branch.

    Args:
        x_ND: (N, D). experts: (non-thinking, thinking) weights, dtype of `x_ND`.
        branch_ids_S: (S,) integers in {0, 1}, each for `rows_per_id` consecutive rows.
        residual_ND: added to the result before it is rounded, or None.
    Returns:
        (y_ND, gate_NF, up_NF): the result and the two pre-activations that the backward needs beside `x_ND`.
    """
    wide = accumulation_dtype(x_ND.dtype)
    features = experts[0].gate_FD.shape[0]
    y_ND = torch.empty_like(x_ND)
    gate_NF, up_NF = x_ND.new_empty(x_ND.shape[0], features), x_ND.new_empty(x_ND.shape[0], features)
    for expert, rows in zip(experts, row_lists(branch_ids_S, rows_per_id), strict=True):
        gate_NF[rows] = _matmul(x_ND[rows], expert.gate_FD.T)
        up_NF[rows] = _matmul(x_ND[rows], expert.up_FD.T)
        # The activation comes from the unrounded products, as in an epilogue: half an ulp closer to the truth.
        a_NF = silu_mul(x_ND[rows].to(wide) @ expert.gate_FD.T.to(wide), x_ND[rows].to(wide) @ expert.up_FD.T.to(wide))
        part = a_NF.to(x_ND.dtype).to(wide) @ expert.down_DF.T.to(wide)
        if residual_ND is not None:
            part = part + residual_ND[rows].to(wide)
        y_ND[rows] = part.to(x_ND.dtype)
    return y_ND, gate_NF, up_NF


def branch_ffn_backward(
    grad_y_ND: Tensor,
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    gate_NF: Tensor | None = None,
    up_NF: Tensor | None = None,
) -> tuple[Tensor, tuple[ExpertWeights, ExpertWeights]]:
    """Gradients of `branch_ffn_forward` (the residual's is `grad_y_ND` itself).

    dA = dY W_down,  (dG, dU, A) = dswiglu(dA, G, U),  dX = dG W_gate + dU W_up,
    dW_down = dY^T A,  dW_gate = dG^T X,  dW_up = dU^T X;  sums over the rows of one branch only.

    Args:
        gate_NF, up_NF: the saved pre-activations; None recomputes them (keeps X only, +33 % backward FLOPs).
    Returns:
        (grad_x_ND, (gradients of expert 0, of expert 1)); exactly 0 for an expert without rows.
    """
    grad_x_ND = torch.empty_like(x_ND)
    gradients = []
    for expert, rows in zip(experts, row_lists(branch_ids_S, rows_per_id), strict=True):
        x, grad_y = x_ND[rows], grad_y_ND[rows]
        gate = _matmul(x, expert.gate_FD.T) if gate_NF is None else gate_NF[rows]
        up = _matmul(x, expert.up_FD.T) if up_NF is None else up_NF[rows]
        grad_gate, grad_up, a = dswiglu(_matmul(grad_y, expert.down_DF), gate, up)
        # Both products in one sum: concatenated along F, so that it is rounded once.
        grad_x_ND[rows] = _matmul(torch.cat([grad_gate, grad_up], 1), torch.cat([expert.gate_FD, expert.up_FD]))
        gradients.append(ExpertWeights(_matmul(grad_gate.T, x), _matmul(grad_up.T, x), _matmul(grad_y.T, a)))
    return grad_x_ND, (gradients[0], gradients[1])
