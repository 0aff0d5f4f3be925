"""Which rows go through which branch: validated once per forward, read by every layer.

Shapes: B batch, T tokens, N = B * T rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .branch import NUM_BRANCHES, Branch
from .errors import BranchError

BranchIds = int | Tensor
_ALLOWED = ", ".join(f"{branch.value} ({branch.label})" for branch in Branch)


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """The rows of a mixed batch, by branch.

    Built on the host from the decision, so that the layers neither search nor synchronise.
    """

    branch_ids: Tensor
    """(B,) or (B, T) int64 on the compute device."""
    rows: tuple[Tensor, Tensor] | None
    """Per branch the indices into the N = B * T flattened rows, int64, ascending. None where shapes must not depend on
    the mix (compiled regions, one-token decoding): the layers then compute both branches and select."""
    runs: tuple[tuple[int, int, int], ...] | None = None
    """(branch, first row, end) of each maximal block of consecutive rows of one branch, in row order, on the host. None
    where `rows` is. What slices need instead of gathers."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "BranchPlan":
        """The same plan on another device (layers of one model may stand on several)."""
        if self.branch_ids.device == torch.device(device):
            return self
        rows = self.rows and tuple(index.to(device, non_blocking=non_blocking) for index in self.rows)
        ids = self.branch_ids.to(device, non_blocking=non_blocking)
        return BranchPlan(ids, rows, self.runs)  # type: ignore[arg-type]


def check_branch(branch: int) -> int:
    """Return `branch` as a plain int.

    Raises:
        BranchError: it is not the number of a branch.
    """
    if isinstance(branch, bool) or not isinstance(branch, int) or not 0 <= branch < NUM_BRANCHES:
        raise BranchError(f"branch_ids must be {_ALLOWED}; found {branch!r}")
    return int(branch)


def check_branch_ids(branch_ids: BranchIds, batch: int, tokens: int | None) -> BranchIds:
    """Check type, dtype, shape and, where that needs no device synchronisation, range.

    Args:
        branch_ids: int, (B,) or (B, T) integer tensor.
        batch: B. `tokens`: T, or None where only (B,) makes sense.
    Raises:
        BranchError: anything else; the message says what was found.
    """
    if isinstance(branch_ids, int):
        return check_branch(branch_ids)
    if not isinstance(branch_ids, Tensor):
        raise BranchError(
            f"branch_ids must be an int or an integer tensor of shape (B,) or (B, T); "
            f"found {type(branch_ids).__name__}: {branch_ids!r}"
        )
    if branch_ids.dtype == torch.bool or branch_ids.is_floating_point() or branch_ids.is_complex():
        raise BranchError(f"branch_ids must hold integers ({_ALLOWED}); found dtype {branch_ids.dtype}")
    allowed = [(batch,)] if tokens is None else [(batch,), (batch, tokens)]
    if tuple(branch_ids.shape) not in allowed:
        raise BranchError(
            f"branch_ids must have shape {' or '.join(map(str, allowed))} for this batch; "
            f"found {tuple(branch_ids.shape)}. Pass one value per query, or per token for packed rows."
        )
    # On an accelerator the range check would wait for the device; there `plan_branches` checks on the host copy.
    if branch_ids.device.type == "cpu" and not torch.compiler.is_compiling() and branch_ids.numel():
        lowest, highest = (int(value) for value in branch_ids.aminmax())
        if lowest < 0 or highest >= NUM_BRANCHES:
            raise BranchError(f"branch_ids must be {_ALLOWED}; found values from {lowest} to {highest}")
    return branch_ids


def plan_branches(
    branch_ids: BranchIds, batch: int, tokens: int, device: torch.device, *, static: bool | None = None
) -> int | BranchPlan:
    """Validate `branch_ids` and lay out the rows for all layers of one forward.

    Args:
        branch_ids: int, or integer tensor (B,) or (B, T) on any device. On the host, it costs no synchronisation.
        batch, tokens: B and T of the hidden states.
        device: where the hidden states are.
        static: keep all shapes independent of the mix. Default: while compiling, and for one token per row on an
            accelerator (where both weight sets are read anyway and a search for rows would wait for the device).
    Returns:
        An int where one branch serves the whole batch, else a `BranchPlan`.
    """
    branch_ids = check_branch_ids(branch_ids, batch, tokens)
    if isinstance(branch_ids, int):
        return branch_ids
    compiling = torch.compiler.is_compiling()
    if static is None:
        static = compiling or (tokens == 1 and branch_ids.device.type != "cpu")
    if static:
        return BranchPlan(branch_ids.to(device=device, dtype=torch.long), rows=None)

    host_ids = branch_ids.to(device="cpu", dtype=torch.long)
    check_branch_ids(host_ids, batch, tokens)
    present = host_ids.unique().tolist()
    if len(present) == 1:
        return int(present[0])
    flat_ids = (host_ids if host_ids.dim() == 2 else host_ids[:, None].expand(batch, tokens)).reshape(-1)
    rows = tuple((flat_ids == branch).nonzero(as_tuple=True)[0].to(device, non_blocking=True) for branch in Branch)
    branches, lengths = torch.unique_consecutive(flat_ids, return_counts=True)
    ends = lengths.cumsum(0).tolist()
    runs = tuple(zip(branches.tolist(), [0, *ends], ends, strict=False))
    return BranchPlan(branch_ids.to(device=device, dtype=torch.long), rows, runs)  # type: ignore[arg-type]
