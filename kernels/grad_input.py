"""The two input-side products of the backward, both branches in one launch each.

    grad_a   dA = dY W_down, then (dG, dU, A) = dswiglu(dA, G, U) in the epilogue: dA itself is never written
    grad_x   dX = dG W_gate + dU W_up in one accumulator, two loops over F in sequence (one loop with both products
             would need twice the shared memory)

Weights are read as they lie, (F, D) and (D, F); here they are the right operand without transposition.
Shapes: N rows, D hidden, F ffn.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouped_work import choose, grid_size, set_descriptor_allocator, split_config, work_item
from .interpreter import dot, narrow
from .launch_table import Config
from .plan import plan_tiles
from .reference import ExpertWeights
from .silu_mul import swiglu_gradient, wide_type


@triton.jit
def _add_product(
    total, left_ptr, right_ptr, left_stride, row, end, column, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """total + left[row:end] @ right[:, column:], right (IN, OUT) row-major; pointers, rows and columns clamped."""
    lane = tl.arange(0, BLOCK_IN)
    rows = tl.minimum(row + tl.arange(0, BLOCK_ROWS), end - 1).to(tl.int64)
    columns = column + tl.arange(0, BLOCK_OUT)
    if OUT % BLOCK_OUT != 0:
        # Only here: clamping hides from the compiler that neighbours are neighbours.
        columns = tl.minimum(columns, OUT - 1)
    left_ptrs = left_ptr + rows[:, None] * left_stride + lane[None, :]
    right_ptrs = right_ptr + lane.to(tl.int64)[:, None] * OUT + columns[None, :]
    for inner in tl.range(0, IN, BLOCK_IN):
        if IN % BLOCK_IN == 0:
            left = tl.load(left_ptrs)
            right = tl.load(right_ptrs)
        else:
            inside = inner + lane < IN
            left = tl.load(left_ptrs, mask=inside[None, :], other=0.0)
            right = tl.load(right_ptrs, mask=inside[:, None], other=0.0)
        total = dot(left, right, total)
        left_ptrs += BLOCK_IN
        right_ptrs += BLOCK_IN * OUT
    return total


@triton.jit
def _grad_a_pointer_kernel(
    grad_y_ptr,
    down0_ptr,
    down1_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    a_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    grad_y_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (F + BLOCK_OUT - 1) // BLOCK_OUT
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        branch, row, end, block = work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        if branch == 0:
            down_ptr = down0_ptr
        else:
            down_ptr = down1_ptr
        grad_a = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        grad_a = _add_product(
            grad_a, grad_y_ptr, down_ptr, grad_y_stride, row, end, column, D, F, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN
        )
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_OUT)
        mask = (rows < end)[:, None] & (columns < F)[None, :]
        at = rows.to(tl.int64)[:, None] * F + columns[None, :]
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(WIDE)
        up = tl.load(up_ptr + at, mask=mask, other=0.0).to(WIDE)
        grad_gate, grad_up, a = swiglu_gradient(grad_a, gate, up)
        element: tl.constexpr = a_ptr.dtype.element_ty
        tl.store(grad_gate_ptr + at, narrow(grad_gate, element), mask=mask)
        tl.store(grad_up_ptr + at, narrow(grad_up, element), mask=mask)
        tl.store(a_ptr + at, narrow(a, element), mask=mask)


@triton.jit
def _grad_a_tma_kernel(
    grad_y_ptr,
    down0_ptr,
    down1_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    a_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    grad_y_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (F + BLOCK_OUT - 1) // BLOCK_OUT
    grad_y_desc = tl.make_tensor_descriptor(grad_y_ptr, [num_rows, D], [grad_y_stride, 1], [BLOCK_ROWS, BLOCK_IN])
    gate_desc = tl.make_tensor_descriptor(gate_ptr, [num_rows, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT // 2])
    up_desc = tl.make_tensor_descriptor(up_ptr, [num_rows, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT // 2])
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        branch, row, end, block = work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        if branch == 0:
            down_ptr = down0_ptr
        else:
            down_ptr = down1_ptr
        down_desc = tl.make_tensor_descriptor(down_ptr, [D, F], [F, 1], [BLOCK_IN, BLOCK_OUT])
        grad_a = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        for inner in tl.range(0, D, BLOCK_IN):
            grad_a = dot(grad_y_desc.load([row, inner]), down_desc.load([inner, column]), grad_a)
        # In halves: one pass over all 128 columns holds eight tiles at once and spills.
        halves = tl.permute(tl.reshape(grad_a, (BLOCK_ROWS, 2, BLOCK_OUT // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_dswiglu(
            left, gate_desc, up_desc, grad_gate_ptr, grad_up_ptr, a_ptr, row, end, column, F, BLOCK_ROWS, BLOCK_OUT // 2
        )
        column += BLOCK_OUT // 2
        _store_dswiglu(
            right,
            gate_desc,
            up_desc,
            grad_gate_ptr,
            grad_up_ptr,
            a_ptr,
            row,
            end,
            column,
            F,
            BLOCK_ROWS,
            BLOCK_OUT // 2,
        )


@triton.jit
def _store_dswiglu(
    grad_a, gate_desc, up_desc, grad_gate_ptr, grad_up_ptr, a_ptr, row, end, column, F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """(dG, dU, A) of one block of dA, clipped at the run's end."""
    element: tl.constexpr = a_ptr.dtype.element_ty
    gate = gate_desc.load([row, column]).to(grad_a.dtype)
    up = up_desc.load([row, column]).to(grad_a.dtype)
    grad_gate, grad_up, a = swiglu_gradient(grad_a, gate, up)
    grad_gate_desc = tl.make_tensor_descriptor(grad_gate_ptr, [end, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT])
    grad_gate_desc.store([row, column], narrow(grad_gate, element))
    grad_up_desc = tl.make_tensor_descriptor(grad_up_ptr, [end, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT])
    grad_up_desc.store([row, column], narrow(grad_up, element))
    a_desc = tl.make_tensor_descriptor(a_ptr, [end, F], [F, 1], [BLOCK_ROWS, BLOCK_OUT])
    a_desc.store([row, column], narrow(a, element))


@triton.jit
def _grad_x_pointer_kernel(
    grad_gate_ptr,
    grad_up_ptr,
    gate0_ptr,
    up0_ptr,
    gate1_ptr,
    up1_ptr,
    grad_x_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        branch, row, end, block = work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        if branch == 0:
            gate_ptr = gate0_ptr
            up_ptr = up0_ptr
        else:
            gate_ptr = gate1_ptr
            up_ptr = up1_ptr
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        total = _add_product(total, grad_gate_ptr, gate_ptr, F, row, end, column, F, D, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN)
        total = _add_product(total, grad_up_ptr, up_ptr, F, row, end, column, F, D, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN)
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_OUT)
        mask = (rows < end)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(grad_x_ptr + at, narrow(total, grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_x_tma_kernel(
    grad_gate_ptr,
    grad_up_ptr,
    gate0_ptr,
    up0_ptr,
    gate1_ptr,
    up1_ptr,
    grad_x_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_tiles = tl.load(counts_ptr)
    num_blocks: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    grad_gate_desc = tl.make_tensor_descriptor(grad_gate_ptr, [num_rows, F], [F, 1], [BLOCK_ROWS, BLOCK_IN])
    grad_up_desc = tl.make_tensor_descriptor(grad_up_ptr, [num_rows, F], [F, 1], [BLOCK_ROWS, BLOCK_IN])
    for work in tl.range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        branch, row, end, block = work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP)
        column = block * BLOCK_OUT
        if branch == 0:
            gate_ptr = gate0_ptr
            up_ptr = up0_ptr
        else:
            gate_ptr = gate1_ptr
            up_ptr = up1_ptr
        gate_desc = tl.make_tensor_descriptor(gate_ptr, [F, D], [D, 1], [BLOCK_IN, BLOCK_OUT])
        up_desc = tl.make_tensor_descriptor(up_ptr, [F, D], [D, 1], [BLOCK_IN, BLOCK_OUT])
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=WIDE)
        for inner in tl.range(0, F, BLOCK_IN):
            total = dot(grad_gate_desc.load([row, inner]), gate_desc.load([inner, column]), total)
        for inner in tl.range(0, F, BLOCK_IN):
            total = dot(grad_up_desc.load([row, inner]), up_desc.load([inner, column]), total)
        out = tl.make_tensor_descriptor(grad_x_ptr, [end, D], [D, 1], [BLOCK_ROWS, BLOCK_OUT])
        out.store([row, column], narrow(total, grad_x_ptr.dtype.element_ty))


def grad_a(
    grad_y_ND: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_gate_NF, grad_up_NF, a_NF) from dY and the pre-activations."""
    num_rows, features = gate_NF.shape
    hidden = grad_y_ND.shape[1]
    grad_gate_NF, grad_up_NF, a_NF = (gate_NF.new_empty(gate_NF.shape) for _ in range(3))
    weights = (experts[0].down_DF, experts[1].down_DF)
    config = config or choose("grad_a", num_rows, hidden, features, (grad_y_ND, *weights, gate_NF, up_NF, a_NF))
    plan = plan_tiles(branch_ids_S, rows_per_id, config["BLOCK_ROWS"])
    constexprs, options = split_config(config)
    kernel = _grad_a_pointer_kernel
    if config["variant"] == "tma":
        set_descriptor_allocator()
        kernel = _grad_a_tma_kernel
    kernel[(grid_size(plan, triton.cdiv(features, config["BLOCK_OUT"]), config),)](
        grad_y_ND,
        *weights,
        gate_NF,
        up_NF,
        grad_gate_NF,
        grad_up_NF,
        a_NF,
        plan.tiles,
        plan.counts,
        plan.bound,
        num_rows,
        grad_y_ND.stride(0),
        D=hidden,
        F=features,
        WIDE=wide_type(gate_NF.dtype),
        **constexprs,
        **options,
    )
    return grad_gate_NF, grad_up_NF, a_NF


def grad_x(
    grad_gate_NF: Tensor,
    grad_up_NF: Tensor,
    experts: tuple[ExpertWeights, ExpertWeights],
    branch_ids_S: Tensor,
    rows_per_id: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """grad_x_ND = dG W_gate + dU W_up, rounded once."""
    num_rows, features = grad_gate_NF.shape
    hidden = experts[0].gate_FD.shape[1]
    grad_x_ND = grad_gate_NF.new_empty(num_rows, hidden)
    weights = (experts[0].gate_FD, experts[0].up_FD, experts[1].gate_FD, experts[1].up_FD)
    config = config or choose("grad_x", num_rows, hidden, features, (grad_gate_NF, grad_up_NF, *weights, grad_x_ND))
    plan = plan_tiles(branch_ids_S, rows_per_id, config["BLOCK_ROWS"])
    constexprs, options = split_config(config)
    kernel = _grad_x_pointer_kernel
    if config["variant"] == "tma":
        set_descriptor_allocator()
        kernel = _grad_x_tma_kernel
    kernel[(grid_size(plan, triton.cdiv(hidden, config["BLOCK_OUT"]), config),)](
        grad_gate_NF,
        grad_up_NF,
        *weights,
        grad_x_ND,
        plan.tiles,
        plan.counts,
        plan.bound,
        num_rows,
        D=hidden,
        F=features,
        WIDE=wide_type(grad_gate_NF.dtype),
        **constexprs,
        **options,
    )
    return grad_x_ND
