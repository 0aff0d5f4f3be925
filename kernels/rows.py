"""What the kernels know about the rows of a batch: a branch id per block of equally many rows and, if known, the runs.

int          one run, nothing to look at
(B,)         an id per query: T rows each
(B, T)       an id per token (packed sequences): one row each
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import Run, find_runs


@dataclass(frozen=True, slots=True)
class RowBranches:
    """The branch of each of N = S * rows_per_id rows."""

    ids_S: Tensor
    """(S,) integers on the compute device, contiguous."""
    rows_per_id: int
    runs: tuple[Run, ...] | None
    """The runs, where the host knows them without asking the device; else None."""

    @property
    def flat_runs(self) -> list[int]:
        """The runs as one list of integers, as an operator argument; empty where unknown (or without rows)."""
        return [number for run in self.runs or () for number in run]


def unflatten_runs(numbers: list[int]) -> tuple[Run, ...]:
    """Inverse of `RowBranches.flat_runs`."""
    return tuple(Run(*numbers[index : index + 3]) for index in range(0, len(numbers), 3))


def row_branches(branch_ids: int | Tensor, batch: int, tokens: int, device: torch.device) -> RowBranches:
    """Lay out `branch_ids` (int, (B,) or (B, T)) over the B * T rows of a batch.

    The runs are found here if the ids stand on the host (then they cost no synchronisation), except while compiling,
    where they would tie the graph to one mix.
    """
    if isinstance(branch_ids, int):
        ids_S = torch.full((1,), branch_ids, dtype=torch.int32, device=device)
        return RowBranches(ids_S, batch * tokens, (Run(branch_ids, 0, batch * tokens),))
    ids_S = branch_ids.reshape(-1)
    rows_per_id = 1 if branch_ids.dim() == 2 else tokens
    runs = None
    if ids_S.device.type == "cpu" and not torch.compiler.is_compiling():
        runs = tuple(find_runs(ids_S, rows_per_id))
    return RowBranches(ids_S.to(device, non_blocking=True), rows_per_id, runs)
