"""dW = sum over the rows of one branch of grad^T input, for both branches in one launch.

Each program owns one block of one branch's dW and walks the tiles of that branch: the rows are the summed dimension, so
here a tile's rows beyond its run's end must not count, and *both* operands are masked (0 times NaN is NaN). A branch
without tiles stores its zeros; a branch whose gradient nobody wants is not launched.

Shapes: N rows, O outputs of the weight, I inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouped_work import split_config
from .interpreter import dot
from .launch_table import Config, table_for
from .plan import plan_tiles
from .reference import NUM_BRANCHES
from .silu_mul import wide_type


@triton.jit
def _grad_weight_kernel(
    grad_ptr,
    input_ptr,
    out0_ptr,
    out1_ptr,
    tiles_ptr,
    counts_ptr,
    bound,
    grad_stride,
    input_stride,
    first_branch,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    branch = first_branch + tl.program_id(1)
    in_blocks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    out_blocks: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    per_group: tl.constexpr = GROUP * in_blocks
    group = tl.program_id(0) // per_group
    size = min(out_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % per_group
    outs = (group * GROUP + within % size) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ins = within // size * BLOCK_IN + tl.arange(0, BLOCK_IN)
    out_clamped = tl.minimum(outs, OUT - 1)
    in_clamped = tl.minimum(ins, IN - 1)

    tiles_of_0 = tl.load(counts_ptr + 1)
    first_tile = tl.where(branch == 0, 0, tiles_of_0)
    last_tile = tl.where(branch == 0, tiles_of_0, tl.load(counts_ptr))
    lane = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=WIDE)
    for tile in tl.range(first_tile, last_tile):
        rows = tl.load(tiles_ptr + bound + tile) + lane
        inside = rows < tl.load(tiles_ptr + 2 * bound + tile)
        rows = rows.to(tl.int64)
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + out_clamped[None, :], mask=inside[:, None], other=0.0)
        values = tl.load(
            input_ptr + rows[:, None] * input_stride + in_clamped[None, :], mask=inside[:, None], other=0.0
        )
        total = dot(tl.trans(grad), values, total)
    if branch == 0:
        out_ptr = out0_ptr
    else:
        out_ptr = out1_ptr
    mask = (outs < OUT)[:, None] & (ins < IN)[None, :]
    at = outs.to(tl.int64)[:, None] * IN + ins[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def grad_weight(
    grad_NO: Tensor,
    input_NI: Tensor,
    branch_ids_S: Tensor,
    rows_per_id: int,
    wanted: tuple[bool, bool],
    *,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dW of branch 0, of branch 1), each (O, I) or None if not wanted. At most one launch beside the plan's."""
    num_rows, outputs = grad_NO.shape
    inputs = input_NI.shape[1]
    results = [grad_NO.new_empty(outputs, inputs) if want else None for want in wanted]
    given = [result for result in results if result is not None]
    if not given:
        return None, None
    if config is None:
        hidden, features = sorted((outputs, inputs))
        config = table_for(grad_NO.device).find("grad_w", hidden, features, grad_NO.dtype, num_rows)
    plan = plan_tiles(branch_ids_S, rows_per_id, config["BLOCK_ROWS"])
    constexprs, options = split_config(config)
    blocks = triton.cdiv(outputs, config["BLOCK_OUT"]) * triton.cdiv(inputs, config["BLOCK_IN"])
    _grad_weight_kernel[(blocks, len(given))](
        grad_NO,
        input_NI,
        given[0] if results[0] is None else results[0],
        given[0] if results[1] is None else results[1],
        plan.tiles,
        plan.counts,
        plan.bound,
        grad_NO.stride(0),
        input_NI.stride(0),
        0 if len(given) == NUM_BRANCHES or wanted[0] else 1,
        OUT=outputs,
        IN=inputs,
        WIDE=wide_type(grad_NO.dtype),
        **constexprs,
        **options,
    )
    return results[0], results[1]
