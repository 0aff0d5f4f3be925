"""y = a W_down^T (+ residual) for both branches in one launch, its sum over F cut into SPLIT parts for small batches.

Down has few, long tiles (D = 3584 columns, F = 18944 summands): below about 4k rows they do not fill the card. With
SPLIT > 1 each part goes to its own float32 plane of a workspace, and `_sum_planes_kernel` adds the planes in a fixed
order: no atomics, so every run gives the same bits.

Shapes: N rows, D hidden, F ffn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_work import choose, grid_size, set_descriptor_allocator, split_config, work_item
from .interpreter import dot, narrow
from .launch_table import Config
from .plan import TilePlan, plan_tiles
from .reference import ExpertWeights
from .silu_mul import wide_type

_SUM_BLOCK = 1024


@triton.jit
def _down_tma_kernel(
    a_ptr,
    down0_ptr,
    down1_ptr,
    y_ptr,
    residual_ptr,
    planes_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    residual_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    per_part: tl.constexpr = ((F + BLOCK_IN - 1) // BLOCK_IN + SPLIT - 1) // SPLIT * BLOCK_IN
    a_desc = tl.make_tensor_descriptor(a_ptr, [num_rows, F], [F, 1], [BLOCK_ROWS, BLOCK_IN])
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks * SPLIT, tl.num_programs(0)):
        part = work % SPLIT
        branch, row, end, block = work_item(work // SPLIT, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        if branch == 0:
            down_ptr = down0_ptr
        else:
            down_ptr = down1_ptr
        down_desc = tl.make_tensor_descriptor(down_ptr, [D, F], [F, 1], [BLOCK_OUT, BLOCK_IN])
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        for inner in tl.range(part * per_part, tl.minimum((part + 1) * per_part, F), BLOCK_IN):
            total = dot(a_desc.load([row, inner]), down_desc.load([column, inner]).T, total)
        if SPLIT == 1:
            # Clipped descriptors, not masked pointers: those made this kernel spill.
            if RESIDUAL:
                residual_desc = tl.make_tensor_descriptor(
                    residual_ptr, [end, D], [residual_stride, 1], [BLOCK_ROWS, BLOCK_OUT]
                )
                total += residual_desc.load([row, column]).to(WIDE)
            y_desc = tl.make_tensor_descriptor(y_ptr, [end, D], [D, 1], [BLOCK_ROWS, BLOCK_OUT])
            y_desc.store([row, column], narrow(total, y_ptr.dtype.element_ty))
        else:
            _store_rows(
                total, y_ptr, residual_ptr, planes_ptr, residual_stride, row, end, column, part, num_rows, D, RESIDUAL,
                BLOCK_ROWS, BLOCK_OUT, SPLIT,
            )  # fmt: skip


@triton.jit
def _down_pointer_kernel(
    a_ptr,
    down0_ptr,
    down1_ptr,
    y_ptr,
    residual_ptr,
    planes_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    residual_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    per_part: tl.constexpr = ((F + BLOCK_IN - 1) // BLOCK_IN + SPLIT - 1) // SPLIT * BLOCK_IN
    lane = tl.arange(0, BLOCK_IN)
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks * SPLIT, tl.num_programs(0)):
        part = work % SPLIT
        branch, row, end, block = work_item(work // SPLIT, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        if branch == 0:
            down_ptr = down0_ptr
        else:
            down_ptr = down1_ptr
        rows = tl.minimum(row + tl.arange(0, BLOCK_ROWS), end - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, BLOCK_OUT), D - 1).to(tl.int64)
        first = part * per_part
        a_ptrs = a_ptr + rows[:, None] * F + (first + lane)[None, :]
        down_ptrs = down_ptr + columns[None, :] * F + (first + lane)[:, None]
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        for inner in tl.range(first, tl.minimum(first + per_part, F), BLOCK_IN):
            if F % BLOCK_IN == 0:
                a = tl.load(a_ptrs)
                weight = tl.load(down_ptrs)
            else:
                inside = inner + lane < F
                a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
                weight = tl.load(down_ptrs, mask=inside[:, None], other=0.0)
            total = dot(a, weight, total)
            a_ptrs += BLOCK_IN
            down_ptrs += BLOCK_IN
        _store_rows(
            total, y_ptr, residual_ptr, planes_ptr, residual_stride, row, end, column, part, num_rows, D, RESIDUAL,
            BLOCK_ROWS, BLOCK_OUT, SPLIT,
        )  # fmt: skip


@triton.jit
def _store_rows(
    total, y_ptr, residual_ptr, planes_ptr, residual_stride, row, end, column, part, num_rows, D: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write one tile: to its plane if the sum is split, else to y, with the residual added."""
    rows = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    columns = column + tl.arange(0, BLOCK_OUT)[None, :]
    mask = (rows < end) & (columns < D)
    if SPLIT > 1:
        plane = part.to(tl.int64) * num_rows * D
        tl.store(planes_ptr + plane + rows * D + columns, total, mask=mask)
    else:
        if RESIDUAL:
            residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0)
            total += residual.to(total.dtype)
        tl.store(y_ptr + rows * D + columns, narrow(total, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_planes_kernel(
    planes_ptr,
    residual_ptr,
    y_ptr,
    num_rows,
    residual_stride,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = plane 0 + plane 1 + ... (+ residual), in this order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    total = tl.load(planes_ptr + row * D + columns, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLIT):
        plane = tl.full((), part, tl.int64) * num_rows * D
        total += tl.load(planes_ptr + plane + row * D + columns, mask=mask, other=0.0)
    if RESIDUAL:
        total += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(total.dtype)
    tl.store(y_ptr + row * D + columns, narrow(total, y_ptr.dtype.element_ty), mask=mask)


def sum_planes(planes_PND: Tensor, residual_ND: Tensor | None, y_ND: Tensor) -> None:
    """Add the P planes, first to last, and the residual; round once into `y_ND`."""
    split, num_rows, hidden = planes_PND.shape
    _sum_planes_kernel[(num_rows, triton.cdiv(hidden, _SUM_BLOCK))](
        planes_PND,
        y_ND if residual_ND is None else residual_ND,
        y_ND,
        num_rows,
        0 if residual_ND is None else residual_ND.stride(0),
        D=hidden,
        RESIDUAL=residual_ND is not None,
        SPLIT=split,
        BLOCK=_SUM_BLOCK,
    )


def down(
    a_NF: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    residual_ND: Tensor | None = None,
    *,
    config: Config | None = None,
    plan: TilePlan | None = None,
) -> Tensor:
    """y_ND in one launch beside the plan's, two where the configuration splits the sum.

    Args:
        a_NF: contiguous. residual_ND: rows evenly spaced, last dimension contiguous, or None.
        config: a launch configuration instead of the table's.
        plan: a plan with the configuration's BLOCK_ROWS, else one is made.
    """
    num_rows, features = a_NF.shape
    hidden = experts[0].down_DF.shape[0]
    y_ND = a_NF.new_empty(num_rows, hidden)
    weights = (experts[0].down_DF, experts[1].down_DF)
    config = config or choose("down", num_rows, hidden, features, (a_NF, *weights, y_ND, residual_ND))
    if plan is None or plan.block_rows != config["BLOCK_ROWS"]:
        plan = plan_tiles(branch_ids_S, rows_per_id, config["BLOCK_ROWS"])
    split = config["SPLIT"]
    wide = torch.float64 if a_NF.dtype == torch.float64 else torch.float32
    planes_PND = y_ND if split == 1 else y_ND.new_empty(split, num_rows, hidden, dtype=wide)
    constexprs, options = split_config(config)
    kernel = _down_pointer_kernel
    if config["variant"] == "tma":
        set_descriptor_allocator()
        kernel = _down_tma_kernel
    kernel[(grid_size(plan, triton.cdiv(hidden, config["BLOCK_OUT"]) * split, config),)](
        a_NF,
        *weights,
        y_ND,
        y_ND if residual_ND is None else residual_ND,
        planes_PND,
        plan.tiles,
        plan.counts,
        plan.bound,
        num_rows,
        0 if residual_ND is None else residual_ND.stride(0),
        D=hidden,
        F=features,
        RESIDUAL=residual_ND is not None and split == 1,
        WIDE=wide_type(a_NF.dtype),
        **constexprs,
        **options,
    )
    if split > 1:
        sum_planes(planes_PND, residual_ND, y_ND)
    return y_ND
