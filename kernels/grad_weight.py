"""dW = sum over the rows of one branch of grad^T input, for both branches in one launch.

Each program owns one block of one branch's dW and walks the runs of that branch. The rows are the summed dimension, so
here rows beyond a run's end must not count: *both* operands are clipped there (0 times NaN is NaN). A branch without
runs stores its zeros; a branch whose gradient nobody wants is not launched.

Shapes: N rows, O outputs of the weight, I inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .grouped_work import choose, set_descriptor_allocator, split_config
from .interpreter import dot, narrow
from .launch_table import Config
from .plan import plan_tiles
from .reference import NUM_BRANCHES
from .silu_mul import wide_type


@triton.jit
def _output_block(
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, GROUP: tl.constexpr
):
    """(first output, first input) of this program's block of dW; GROUP blocks of outputs walk the inputs together."""
    in_blocks: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    out_blocks: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    per_group: tl.constexpr = GROUP * in_blocks
    group = tl.program_id(0) // per_group
    size = min(out_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % per_group
    return (group * GROUP + within % size) * BLOCK_OUT, within // size * BLOCK_IN


@triton.jit
def _grad_weight_pointer_kernel(
    grad_ptr,
    input_ptr,
    out0_ptr,
    out1_ptr,
    run_starts_ptr,
    counts_ptr,
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
    out_start, in_start = _output_block(OUT, IN, BLOCK_OUT, BLOCK_IN, GROUP)
    outs = out_start + tl.arange(0, BLOCK_OUT)
    ins = in_start + tl.arange(0, BLOCK_IN)
    lane = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=WIDE)
    first_run = (tl.load(counts_ptr + 3) + branch) % 2
    for run in range(first_run, tl.load(counts_ptr + 2), 2):
        start = tl.load(run_starts_ptr + run)
        end = tl.load(run_starts_ptr + run + 1)
        grad_ptrs = grad_ptr + (start + lane).to(tl.int64)[:, None] * grad_stride + outs[None, :]
        input_ptrs = input_ptr + (start + lane).to(tl.int64)[:, None] * input_stride + ins[None, :]
        for row in tl.range(start, end, BLOCK_ROWS):
            inside = (row + lane < end)[:, None]
            grad_mask = inside if OUT % BLOCK_OUT == 0 else inside & (outs < OUT)[None, :]
            input_mask = inside if IN % BLOCK_IN == 0 else inside & (ins < IN)[None, :]
            grad = tl.load(grad_ptrs, mask=grad_mask, other=0.0)
            values = tl.load(input_ptrs, mask=input_mask, other=0.0)
            total = dot(tl.trans(grad), values, total)
            # int64: a caller's stride may be huge
            grad_ptrs += tl.full((), BLOCK_ROWS, tl.int64) * grad_stride
            input_ptrs += tl.full((), BLOCK_ROWS, tl.int64) * input_stride
    if branch == 0:
        out_ptr = out0_ptr
    else:
        out_ptr = out1_ptr
    mask = (outs < OUT)[:, None] & (ins < IN)[None, :]
    at = outs.to(tl.int64)[:, None] * IN + ins[None, :]
    tl.store(out_ptr + at, narrow(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_weight_tma_kernel(
    grad_ptr,
    input_ptr,
    out0_ptr,
    out1_ptr,
    run_starts_ptr,
    counts_ptr,
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
    out_start, in_start = _output_block(OUT, IN, BLOCK_OUT, BLOCK_IN, GROUP)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=WIDE)
    first_run = (tl.load(counts_ptr + 3) + branch) % 2
    for run in range(first_run, tl.load(counts_ptr + 2), 2):
        start = tl.load(run_starts_ptr + run)
        end = tl.load(run_starts_ptr + run + 1)
        # Clipped at the run's end, where the copy engine fills with zeros.
        grad_desc = tl.make_tensor_descriptor(grad_ptr, [end, OUT], [grad_stride, 1], [BLOCK_ROWS, BLOCK_OUT])
        input_desc = tl.make_tensor_descriptor(input_ptr, [end, IN], [input_stride, 1], [BLOCK_ROWS, BLOCK_IN])
        for row in tl.range(start, end, BLOCK_ROWS):
            total = dot(grad_desc.load([row, out_start]).T, input_desc.load([row, in_start]), total)
    if branch == 0:
        out_ptr = out0_ptr
    else:
        out_ptr = out1_ptr
    out_desc = tl.make_tensor_descriptor(out_ptr, [OUT, IN], [IN, 1], [BLOCK_OUT, BLOCK_IN])
    out_desc.store([out_start, in_start], narrow(total, out_ptr.dtype.element_ty))


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
        config = choose("grad_w", num_rows, hidden, features, (grad_NO, input_NI, *given))
    plan = plan_tiles(branch_ids_S, rows_per_id, config["BLOCK_ROWS"])
    constexprs, options = split_config(config)
    kernel = _grad_weight_pointer_kernel
    if config["variant"] == "tma":
        set_descriptor_allocator()
        kernel = _grad_weight_tma_kernel
    blocks = triton.cdiv(outputs, config["BLOCK_OUT"]) * triton.cdiv(inputs, config["BLOCK_IN"])
    kernel[(blocks, len(given))](
        grad_NO,
        input_NI,
        given[0] if results[0] is None else results[0],
        given[0] if results[1] is None else results[1],
        plan.run_starts,
        plan.counts,
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
