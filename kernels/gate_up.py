"""a = silu(x W_gate^T) * (x W_up^T) for both branches in one launch: two accumulators share each activation tile.

Two forms of one kernel: descriptors (TMA, sm_90 and newer) and pointers (everything else, and unaligned tensors). The
weights are six separate tensors: a program picks the pointers of its tile's branch before the loop over D. Outputs are
clipped at the end of the run, so a tile that ends early reads its neighbours' rows and never writes them.

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


@triton.jit
def _gate_up_tma_kernel(
    x_ptr,
    gate0_ptr,
    up0_ptr,
    gate1_ptr,
    up1_ptr,
    a_ptr,
    gate_out_ptr,
    up_out_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    x_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (F + BLOCK_OUT - 1) // BLOCK_OUT
    element: tl.constexpr = a_ptr.dtype.element_ty
    x_desc = tl.make_tensor_descriptor(x_ptr, [num_rows, D], [x_stride, 1], [BLOCK_ROWS, BLOCK_IN])
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        branch, row, end, block = work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        # The branch is chosen here and not in the loop over D, which would lose its pipelining.
        if branch == 0:
            gate_ptr = gate0_ptr
            up_ptr = up0_ptr
        else:
            gate_ptr = gate1_ptr
            up_ptr = up1_ptr
        gate_desc = tl.make_tensor_descriptor(gate_ptr, [F, D], [D, 1], [BLOCK_OUT, BLOCK_IN])
        up_desc = tl.make_tensor_descriptor(up_ptr, [F, D], [D, 1], [BLOCK_OUT, BLOCK_IN])
        gate = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        up = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        for inner in tl.range(0, D, BLOCK_IN):
            x = x_desc.load([row, inner])
            gate = dot(x, gate_desc.load([column, inner]).T, gate)
            up = dot(x, up_desc.load([column, inner]).T, up)
        a_desc = tl.make_tensor_descriptor(a_ptr, [end, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT])
        a_desc.store([row, column], narrow(gate * tl.sigmoid(gate) * up, element))
        if KEEP:
            gate_out = tl.make_tensor_descriptor(gate_out_ptr, [end, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT])
            gate_out.store([row, column], narrow(gate, element))
            up_out = tl.make_tensor_descriptor(up_out_ptr, [end, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT])
            up_out.store([row, column], narrow(up, element))


@triton.jit
def _gate_up_pointer_kernel(
    x_ptr,
    gate0_ptr,
    up0_ptr,
    gate1_ptr,
    up1_ptr,
    a_ptr,
    gate_out_ptr,
    up_out_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    x_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (F + BLOCK_OUT - 1) // BLOCK_OUT
    inner = tl.arange(0, BLOCK_IN)
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        branch, row, end, block = work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        if branch == 0:
            gate_ptr = gate0_ptr
            up_ptr = up0_ptr
        else:
            gate_ptr = gate1_ptr
            up_ptr = up1_ptr
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        # Clamped, not masked: what the last rows and columns repeat is never stored. int64: N * F passes 2**31.
        x_offset = tl.minimum(rows, end - 1).to(tl.int64) * x_stride
        weight_offset = tl.minimum(columns, F - 1).to(tl.int64) * D
        x_ptrs = x_ptr + x_offset[:, None] + inner[None, :]
        gate_ptrs = gate_ptr + weight_offset[None, :] + inner[:, None]
        up_ptrs = up_ptr + weight_offset[None, :] + inner[:, None]
        gate = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        up = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        for start in tl.range(0, D, BLOCK_IN):
            if D % BLOCK_IN == 0:
                x = tl.load(x_ptrs)
                gate_weight = tl.load(gate_ptrs)
                up_weight = tl.load(up_ptrs)
            else:
                inside = start + inner < D
                x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
                gate_weight = tl.load(gate_ptrs, mask=inside[:, None], other=0.0)
                up_weight = tl.load(up_ptrs, mask=inside[:, None], other=0.0)
            gate = dot(x, gate_weight, gate)
            up = dot(x, up_weight, up)
            x_ptrs += BLOCK_IN
            gate_ptrs += BLOCK_IN
            up_ptrs += BLOCK_IN
        element: tl.constexpr = a_ptr.dtype.element_ty
        out = rows.to(tl.int64)[:, None] * F + columns[None, :]
        mask = (rows < end)[:, None] & (columns < F)[None, :]
        tl.store(a_ptr + out, narrow(gate * tl.sigmoid(gate) * up, element), mask=mask)
        if KEEP:
            tl.store(gate_out_ptr + out, narrow(gate, element), mask=mask)
            tl.store(up_out_ptr + out, narrow(up, element), mask=mask)


def gate_up(
    x_ND: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    *,
    keep: bool,
    config: Config | None = None,
    plan: TilePlan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(a_NF, gate_NF, up_NF) in one launch beside the plan's; the pre-activations only if `keep`.

    Args:
        x_ND: rows evenly spaced, last dimension contiguous.
        config: a launch configuration instead of the table's.
        plan: a plan with the configuration's BLOCK_ROWS, else one is made.
    """
    num_rows, hidden = x_ND.shape
    features = experts[0].gate_FD.shape[0]
    a_NF = x_ND.new_empty(num_rows, features)
    gate_NF, up_NF = (torch.empty_like(a_NF), torch.empty_like(a_NF)) if keep else (None, None)
    weights = (experts[0].gate_FD, experts[0].up_FD, experts[1].gate_FD, experts[1].up_FD)
    name = "gate_up_keep" if keep else "gate_up"
    config = config or choose(name, num_rows, hidden, features, (x_ND, *weights, a_NF))
    plan = plan or plan_tiles(branch_ids_S, rows_per_id, config["BLOCK_ROWS"])
    constexprs, options = split_config(config)
    kernel = _gate_up_pointer_kernel
    if config["variant"] == "tma":
        set_descriptor_allocator()
        kernel = _gate_up_tma_kernel
    kernel[(grid_size(plan, triton.cdiv(features, config["BLOCK_OUT"]), config),)](
        x_ND,
        *weights,
        a_NF,
        a_NF if gate_NF is None else gate_NF,
        a_NF if up_NF is None else up_NF,
        plan.tiles,
        plan.counts,
        plan.bound,
        num_rows,
        x_ND.stride(0),
        D=hidden,
        F=features,
        KEEP=keep,
        WIDE=wide_type(x_ND.dtype),
        **constexprs,
        **options,
    )
    return a_NF, gate_NF, up_NF
