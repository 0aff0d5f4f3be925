"""The tile plan on the device: which rows each tile of a GEMM covers, and of which branch. One launch, one program.

The host never looks at the branch ids: buffers are sized by a bound that holds for every mix, and the kernels read the
true number of tiles from the plan. So a captured graph replays with another mix. Definition: `reference.tile_plan`.

    ids        0 0 1 0          rows_per_id = 100, block_rows = 128
    runs       [0,200) [200,300) [300,400)
    tiles      branch 0: 0, 128, 300       branch 1: 200          (start of each; each ends at its run's end)

The program makes three passes, a barrier between them, since each reads what other threads of it wrote before:
    1. ids  -> run_starts      a run begins where the id differs from its left neighbour
    2. runs -> run_first_tile  running sums of cdiv(length, block_rows), one per branch
    3. tiles -> their run      binary search; runs alternate, so the i-th run of a branch is number first + 2 i

Shapes: S ids, each for `rows_per_id` rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import max_tiles

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of at most `block_rows` rows, those of branch 0 first."""

    tiles: Tensor
    """(3, bound) int32: branch, first row, end of the run. Only the first `counts[0]` columns are written."""
    counts: Tensor
    """(4,) int32: tiles in all, tiles of branch 0, runs, branch of the first run. Runs alternate between branches."""
    run_starts: Tensor
    """(S + 1,) int32: first row of each run, then the end of the last. Only the first `counts[2]` + 1 are written."""
    block_rows: int

    @property
    def bound(self) -> int:
        """The most tiles that any mix can have, known without looking."""
        return self.tiles.shape[1]


@triton.jit
def _tile_plan_kernel(
    ids_ptr,
    tiles_ptr,
    counts_ptr,
    run_starts_ptr,
    run_first_tile_ptr,
    num_ids,
    rows_per_id,
    bound,
    search_steps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)

    num_runs = 0
    for base in range(0, num_ids, BLOCK):
        index = base + lane
        valid = index < num_ids
        branch = tl.load(ids_ptr + index, mask=valid, other=0).to(tl.int32)
        left = tl.load(ids_ptr + index - 1, mask=valid & (index > 0), other=-1).to(tl.int32)
        begins = valid & (branch != left)
        position = num_runs + tl.cumsum(begins.to(tl.int32), 0) - 1
        tl.store(run_starts_ptr + position, index * rows_per_id, mask=begins)
        num_runs += tl.sum(begins.to(tl.int32), 0)
    tl.store(run_starts_ptr + num_runs, num_ids * rows_per_id)
    tl.debug_barrier()

    first_branch = tl.load(ids_ptr).to(tl.int32)
    tiles_0 = 0
    tiles_1 = 0
    for base in range(0, num_runs, BLOCK):
        run = base + lane
        valid = run < num_runs
        start = tl.load(run_starts_ptr + run, mask=valid, other=0)
        end = tl.load(run_starts_ptr + run + 1, mask=valid, other=0)
        tiles = tl.cdiv(end - start, BLOCK_ROWS)
        is_0 = (first_branch + run) % 2 == 0
        in_0 = tl.where(is_0, tiles, 0)
        in_1 = tl.where(is_0, 0, tiles)
        first_tile = tl.where(is_0, tiles_0 + tl.cumsum(in_0, 0) - in_0, tiles_1 + tl.cumsum(in_1, 0) - in_1)
        tl.store(run_first_tile_ptr + run, first_tile, mask=valid)
        tiles_0 += tl.sum(in_0, 0)
        tiles_1 += tl.sum(in_1, 0)
    tl.store(counts_ptr, tiles_0 + tiles_1)
    tl.store(counts_ptr + 1, tiles_0)
    tl.store(counts_ptr + 2, num_runs)
    tl.store(counts_ptr + 3, first_branch)
    tl.debug_barrier()

    for base in range(0, tiles_0 + tiles_1, BLOCK):
        tile = base + lane
        valid = tile < tiles_0 + tiles_1
        branch = (tile >= tiles_0).to(tl.int32)
        of_branch = tile - branch * tiles_0
        first_run = (first_branch + branch) % 2
        # The last run of this branch whose first tile is not after ours.
        low = tl.zeros((BLOCK,), dtype=tl.int32)
        high = (num_runs - first_run + 1) // 2 - 1
        for _ in range(search_steps):
            middle = (low + high + 1) // 2
            first_tile = tl.load(run_first_tile_ptr + first_run + 2 * middle, mask=valid & (low < high), other=0)
            go_right = first_tile <= of_branch
            low, high = tl.where((low < high) & go_right, middle, low), tl.where(go_right, high, middle - 1)
            high = tl.maximum(low, high)
        run = first_run + 2 * low
        start = tl.load(run_starts_ptr + run, mask=valid, other=0)
        end = tl.load(run_starts_ptr + run + 1, mask=valid, other=0)
        first_tile = tl.load(run_first_tile_ptr + run, mask=valid, other=0)
        row = start + (of_branch - first_tile) * BLOCK_ROWS
        tl.store(tiles_ptr + tile, branch, mask=valid)
        tl.store(tiles_ptr + bound + tile, row, mask=valid)
        tl.store(tiles_ptr + 2 * bound + tile, end, mask=valid)


def plan_tiles(branch_ids_S: Tensor, rows_per_id: int, block_rows: int) -> TilePlan:
    """Cut S * rows_per_id rows into tiles of one branch each, on the device of the ids, without a synchronisation.

    Args:
        branch_ids_S: (S,) integers in {0, 1}, contiguous.
        rows_per_id: consecutive rows that each id covers. S * rows_per_id must stay below 2**31.
        block_rows: rows of a tile.
    """
    num_ids, device = branch_ids_S.shape[0], branch_ids_S.device
    bound = max_tiles(num_ids, rows_per_id, block_rows)
    if bound == 0:
        nothing = torch.zeros(4, dtype=torch.int32, device=device)
        return TilePlan(torch.empty(3, 0, dtype=torch.int32, device=device), nothing, nothing[:1], block_rows)
    tiles = torch.empty(3, bound, dtype=torch.int32, device=device)
    counts = torch.empty(4, dtype=torch.int32, device=device)
    run_starts, run_first_tile = torch.empty(2, num_ids + 1, dtype=torch.int32, device=device)
    _tile_plan_kernel[(1,)](
        branch_ids_S,
        tiles,
        counts,
        run_starts,
        run_first_tile,
        num_ids,
        rows_per_id,
        bound,
        num_ids.bit_length(),
        BLOCK_ROWS=block_rows,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return TilePlan(tiles, counts, run_starts, block_rows)
