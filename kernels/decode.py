"""The branch FFN for few rows (1 to 128): the weights stream once past all rows; nothing else matters at this size.

    gate_up   one program per (block of F, branch)          down   one program per (block of D, branch, part of F)

Each program multiplies its weights, as the left operand, with *all* rows, as columns, and stores the columns of its
branch. Rows are padded to a power of two anyway, so gathering the branch's rows first would save nothing; a row of the
other branch costs idle arithmetic, no memory. A program whose branch has no row returns before it touches a weight.
The branch ids are read on the device, so a captured graph replays with another mix.

Shapes: N rows, D hidden, F ffn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .down import sum_planes
from .grouped_work import split_config
from .interpreter import dot, narrow
from .launch_table import Config, table_for
from .reference import NUM_BRANCHES, ExpertWeights
from .silu_mul import wide_type

MAX_ROWS = 128


@triton.jit
def _rows_of(branch, ids_ptr, num_rows, rows_per_id, TOKENS: tl.constexpr):
    """Which of TOKENS rows belong to `branch`."""
    row = tl.arange(0, TOKENS)
    ids = tl.load(ids_ptr + row // rows_per_id, mask=row < num_rows, other=-1)
    return ids == branch


@triton.jit
def _decode_gate_up_kernel(
    x_ptr,
    gate0_ptr,
    up0_ptr,
    gate1_ptr,
    up1_ptr,
    a_ptr,
    ids_ptr,
    num_rows,
    rows_per_id,
    x_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    branch = tl.program_id(1)
    is_mine = _rows_of(branch, ids_ptr, num_rows, rows_per_id, TOKENS)
    if tl.sum(is_mine.to(tl.int32), 0) > 0:
        if branch == 0:
            gate_ptr = gate0_ptr
            up_ptr = up0_ptr
        else:
            gate_ptr = gate1_ptr
            up_ptr = up1_ptr
        columns = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inner = tl.arange(0, BLOCK_IN)
        rows = tl.minimum(tl.arange(0, TOKENS), num_rows - 1).to(tl.int64)
        weight_offset = tl.minimum(columns, F - 1).to(tl.int64)[:, None] * D + inner[None, :]
        gate_ptrs = gate_ptr + weight_offset
        up_ptrs = up_ptr + weight_offset
        x_ptrs = x_ptr + rows[None, :] * x_stride + inner[:, None]
        gate = tl.zeros((BLOCK_OUT, TOKENS), dtype=WIDE)
        up = tl.zeros((BLOCK_OUT, TOKENS), dtype=WIDE)
        for start in tl.range(0, D, BLOCK_IN):
            inside = start + inner < D
            x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
            # evict_first: each weight is read once per step, and would push the rows out of L2.
            gate_weight = tl.load(gate_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            up_weight = tl.load(up_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            gate = dot(gate_weight, x, gate)
            up = dot(up_weight, x, up)
            gate_ptrs += BLOCK_IN
            up_ptrs += BLOCK_IN
            x_ptrs += BLOCK_IN
        a = tl.trans(narrow(gate * tl.sigmoid(gate) * up, a_ptr.dtype.element_ty))
        mask = is_mine[:, None] & (columns < F)[None, :]
        out = tl.arange(0, TOKENS).to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(a_ptr + out, a, mask=mask)


@triton.jit
def _decode_down_kernel(
    a_ptr,
    down0_ptr,
    down1_ptr,
    y_ptr,
    residual_ptr,
    planes_ptr,
    ids_ptr,
    num_rows,
    rows_per_id,
    residual_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    branch = tl.program_id(1)
    part = tl.program_id(2)
    is_mine = _rows_of(branch, ids_ptr, num_rows, rows_per_id, TOKENS)
    if tl.sum(is_mine.to(tl.int32), 0) > 0:
        if branch == 0:
            down_ptr = down0_ptr
        else:
            down_ptr = down1_ptr
        per_part: tl.constexpr = ((F + BLOCK_IN - 1) // BLOCK_IN + SPLIT - 1) // SPLIT * BLOCK_IN
        columns = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inner = tl.arange(0, BLOCK_IN)
        first = part * per_part
        rows = tl.minimum(tl.arange(0, TOKENS), num_rows - 1).to(tl.int64)
        down_ptrs = down_ptr + tl.minimum(columns, D - 1).to(tl.int64)[:, None] * F + (first + inner)[None, :]
        a_ptrs = a_ptr + rows[None, :] * F + (first + inner)[:, None]
        total = tl.zeros((BLOCK_OUT, TOKENS), dtype=WIDE)
        for start in tl.range(first, tl.minimum(first + per_part, F), BLOCK_IN):
            inside = start + inner < F
            a = tl.load(a_ptrs, mask=inside[:, None], other=0.0)
            weight = tl.load(down_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            total = dot(weight, a, total)
            down_ptrs += BLOCK_IN
            a_ptrs += BLOCK_IN
        total = tl.trans(total)
        own_rows = tl.arange(0, TOKENS).to(tl.int64)[:, None]
        mask = is_mine[:, None] & (columns < D)[None, :]
        if SPLIT > 1:
            plane = part.to(tl.int64) * num_rows * D
            tl.store(planes_ptr + plane + own_rows * D + columns[None, :], total, mask=mask)
        else:
            if RESIDUAL:
                residual = tl.load(residual_ptr + own_rows * residual_stride + columns[None, :], mask=mask, other=0.0)
                total += residual.to(WIDE)
            tl.store(y_ptr + own_rows * D + columns[None, :], narrow(total, y_ptr.dtype.element_ty), mask=mask)


def decode_gate_up(
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """a_NF = silu(x W_gate^T) * (x W_up^T), each row with its branch's weights. One launch; 1 <= N <= 128."""
    num_rows, hidden = x_ND.shape
    features = experts[0].gate_FD.shape[0]
    a_NF = x_ND.new_empty(num_rows, features)
    tokens = _padded(num_rows)
    config = config or table_for(x_ND.device).find("decode_gate_up", hidden, features, x_ND.dtype, tokens)
    constexprs, options = split_config(config)
    _decode_gate_up_kernel[(triton.cdiv(features, config["BLOCK_OUT"]), NUM_BRANCHES)](
        x_ND,
        experts[0].gate_FD,
        experts[0].up_FD,
        experts[1].gate_FD,
        experts[1].up_FD,
        a_NF,
        branch_ids_S,
        num_rows,
        rows_per_id,
        x_ND.stride(0),
        D=hidden,
        F=features,
        WIDE=wide_type(x_ND.dtype),
        TOKENS=tokens,
        **constexprs,
        **options,
    )
    return a_NF


def decode_down(
    a_NF: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    residual_ND: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """y_ND = a W_down^T (+ residual). One launch, two where the configuration splits the sum; 1 <= N <= 128."""
    num_rows, features = a_NF.shape
    hidden = experts[0].down_DF.shape[0]
    y_ND = a_NF.new_empty(num_rows, hidden)
    tokens = _padded(num_rows)
    config = config or table_for(a_NF.device).find("decode_down", hidden, features, a_NF.dtype, tokens)
    split = config["SPLIT"]
    wide = torch.float64 if a_NF.dtype == torch.float64 else torch.float32
    planes_PND = y_ND if split == 1 else y_ND.new_empty(split, num_rows, hidden, dtype=wide)
    constexprs, options = split_config(config)
    _decode_down_kernel[(triton.cdiv(hidden, config["BLOCK_OUT"]), NUM_BRANCHES, split)](
        a_NF,
        experts[0].down_DF,
        experts[1].down_DF,
        y_ND,
        y_ND if residual_ND is None else residual_ND,
        planes_PND,
        branch_ids_S,
        num_rows,
        rows_per_id,
        0 if residual_ND is None else residual_ND.stride(0),
        D=hidden,
        F=features,
        RESIDUAL=residual_ND is not None and split == 1,
        WIDE=wide_type(a_NF.dtype),
        TOKENS=tokens,
        **constexprs,
        **options,
    )
    if split > 1:
        sum_planes(planes_PND, residual_ND, y_ND)
    return y_ND


def _padded(num_rows: int) -> int:
    # 16: the smallest operand of a matrix instruction.
    return max(16, triton.next_power_of_2(num_rows))


def forward(
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    residual_ND: Tensor | None,
) -> Tensor:
    """y_ND in two launches (three where down splits its sum)."""
    a_NF = decode_gate_up(x_ND, experts, branch_ids_S, rows_per_id)
    return decode_down(a_NF, experts, branch_ids_S, rows_per_id, residual_ND)
