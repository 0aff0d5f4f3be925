"""The tile plan: the kernel equals the definition, and the definition has the properties that the GEMMs rely on."""

from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metis_home.kernels.plan import plan_tiles
from metis_home.kernels.reference import find_runs, max_tiles, row_lists, tile_plan

IDS = st.lists(st.integers(0, 1), max_size=40).map(lambda ids: torch.tensor(ids, dtype=torch.long))
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(ids=IDS, rows_per_id=st.integers(0, 40), block_rows=st.sampled_from([16, 32]))
@FEW
def test_every_row_is_in_exactly_one_tile_of_its_branch(ids, rows_per_id, block_rows) -> None:
    tiles = tile_plan(ids, rows_per_id, block_rows)

    branch_N = ids.repeat_interleave(rows_per_id)
    seen = torch.zeros(len(branch_N), dtype=torch.long)
    for branch, start, end in tiles:
        rows = slice(start, min(start + block_rows, end))
        seen[rows] += 1
        assert (branch_N[start:end] == branch).all()
    assert (seen == 1).all()
    assert len(tiles) <= max_tiles(len(ids), rows_per_id, block_rows)
    assert [tile.branch for tile in tiles] == sorted(tile.branch for tile in tiles)


@given(ids=IDS, rows_per_id=st.integers(0, 40))
@FEW
def test_runs_alternate_and_cover_all_rows(ids, rows_per_id) -> None:
    runs = find_runs(ids, rows_per_id)

    assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])][: len(runs)]
    assert sum(run.end - run.start for run in runs) == len(ids) * rows_per_id
    assert all(left.branch != right.branch for left, right in pairwise(runs))


@given(ids=IDS, rows_per_id=st.integers(0, 5))
@FEW
def test_row_lists_are_a_stable_permutation(ids, rows_per_id) -> None:
    lists = row_lists(ids, rows_per_id)

    order = torch.cat(lists)
    assert torch.equal(order.sort().values, torch.arange(len(ids) * rows_per_id))
    assert all((rows.diff() > 0).all() for rows in lists)
    inverse = order.argsort()
    assert torch.equal(order[inverse], torch.arange(len(order)))


@given(ids=IDS, rows_per_id=st.integers(0, 40), block_rows=st.sampled_from([16, 32]))
@settings(FEW, max_examples=25)
def test_the_kernel_makes_the_plan_of_the_definition(ids, rows_per_id, block_rows) -> None:
    assert_plan(ids, rows_per_id, block_rows)


def test_many_alternating_rows_span_several_chunks() -> None:
    # the kernel works in chunks of 1,024 ids, runs and tiles
    assert_plan(torch.arange(2500) % 2, 1, 16)
    assert_plan(torch.cat([torch.zeros(1024), torch.ones(1024), torch.zeros(3)]).long(), 3, 16)


def assert_plan(ids: torch.Tensor, rows_per_id: int, block_rows: int) -> None:
    plan = plan_tiles(ids, rows_per_id, block_rows)

    want, runs = tile_plan(ids, rows_per_id, block_rows), find_runs(ids, rows_per_id)
    count, of_branch_0, num_runs, first_branch = plan.counts.tolist()
    assert plan.tiles[:, :count].T.tolist() == [list(tile) for tile in want]
    assert of_branch_0 == sum(tile.branch == 0 for tile in want)
    assert num_runs == len(runs)
    if runs:
        assert first_branch == runs[0].branch
        assert plan.run_starts[: num_runs + 1].tolist() == [*(run.start for run in runs), runs[-1].end]
