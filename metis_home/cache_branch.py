"""A key-value cache remembers the branch that filled it.

Keys and values of every layer but the first come out of FFNs, so a cache belongs to one branch per row. The stamp lets a
conversation go on with the branch it began with, and refuses the other one.
"""

from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .branch_plan import BranchIds, BranchPlan
from .errors import CacheBranchError

_ATTRIBUTE = "_metis_home_branch"


@dataclass(slots=True)
class CacheBranch:
    """The branch of each row of a cache."""

    branch_ids: int | Tensor
    """An int for all rows, or (B,) int64 on the CPU."""
    copies: dict[torch.device, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    """(B,) int64 on the CPU, also where all rows agree: what decoding compares with at every step."""

    def on(self, device: torch.device) -> int | Tensor:
        """The branches as an int or a tensor on `device`; the copy is made once."""
        if isinstance(self.branch_ids, int) or device.type == "cpu":
            return self.branch_ids
        if device not in self.copies:
            self.copies[device] = self.branch_ids.to(device)
        return self.copies[device]

    def matches(self, branch_ids: BranchIds) -> bool:
        """Does the cache belong to these branches? Costs no device synchronisation for tensors that `on` returned."""
        if isinstance(branch_ids, int):
            return isinstance(self.branch_ids, int) and branch_ids == self.branch_ids
        if any(branch_ids is copy for copy in self.copies.values()):
            return True
        if self.rows is not None and _is_host_rows(branch_ids) and branch_ids.shape == self.rows.shape:
            return torch.equal(branch_ids, self.rows)
        other = to_host(branch_ids)
        if isinstance(other, int) or isinstance(self.branch_ids, int):
            return isinstance(other, int) and isinstance(self.branch_ids, int) and other == self.branch_ids
        return other is not None and torch.equal(other, self.branch_ids)


def to_host(branch_ids: BranchIds) -> int | Tensor | None:
    """Return branches per row: an int where all rows agree, else (B,) int64 on the CPU; None for per-token ids that
    change within a row (packed rows: such a cache cannot be continued)."""
    if isinstance(branch_ids, int):
        return int(branch_ids)
    host_ids = branch_ids.detach().to(device="cpu", dtype=torch.long)
    if host_ids.dim() == 2:
        if host_ids.shape[1] == 0 or not bool((host_ids == host_ids[:, :1]).all()):
            return None
        host_ids = host_ids[:, 0]
    present = host_ids.unique()
    return int(present[0]) if present.numel() == 1 else host_ids.clone()


def _is_host_rows(branch_ids: Tensor) -> bool:
    return branch_ids.dim() == 1 and branch_ids.device.type == "cpu" and branch_ids.dtype == torch.long


def read_stamp(cache: Cache | None) -> CacheBranch | None:
    """The stamp of a cache, if it has one."""
    return getattr(cache, _ATTRIBUTE, None)


def stamp_cache(cache: Cache | None, branch_ids: BranchIds) -> CacheBranch | None:
    """Write down which branch fills `cache`; returns the stamp. Does nothing inside a compiled region."""
    if cache is None or torch.compiler.is_compiling():
        return None
    stamp = read_stamp(cache)
    if stamp is not None and stamp.matches(branch_ids):
        return stamp
    host_ids = to_host(branch_ids)
    if host_ids is None:
        return None
    rows = branch_ids.clone() if isinstance(branch_ids, Tensor) and _is_host_rows(branch_ids) else None
    stamp = CacheBranch(host_ids, rows=rows)
    setattr(cache, _ATTRIBUTE, stamp)
    return stamp


@overload
def branch_for_cache(cache: Cache | None, branch_ids: BranchPlan) -> BranchPlan: ...
@overload
def branch_for_cache(cache: Cache | None, branch_ids: BranchIds | None) -> BranchIds | None: ...
def branch_for_cache(cache: Cache | None, branch_ids: BranchIds | BranchPlan | None) -> BranchIds | BranchPlan | None:
    """Return the branches that a forward on `cache` must use; None means that there is nothing to continue.

    Args:
        cache: the cache that the forward will read and extend.
        branch_ids: what the caller asks for, None to continue with whatever filled the cache.
    Raises:
        CacheBranchError: the cache was filled by another branch, or nobody knows by which.
    """
    if cache is None or torch.compiler.is_compiling() or isinstance(branch_ids, BranchPlan):
        return branch_ids
    stamp = read_stamp(cache)
    if branch_ids is not None and (stamp is None or stamp.matches(branch_ids)):
        return branch_ids
    if int(cache.get_seq_length()) == 0:  # fresh, or reset with an old stamp
        return branch_ids
    if stamp is not None and branch_ids is not None:
        raise CacheBranchError(
            f"this cache was filled with branch_ids {_show(stamp.branch_ids)}, now {_show(to_host(branch_ids))} is asked "
            "for. Its keys and values depend on the branch: leave branch_ids / thinking out to continue with the same "
            "branch, or start a new cache."
        )
    if stamp is None:
        raise CacheBranchError(
            "past_key_values is not empty and carries no branch: it was not filled by this model, or it was filled with "
            "packed rows. Pass branch_ids, or start from an empty cache."
        )
    return stamp.branch_ids


def _show(branch_ids: BranchIds | None) -> str:
    return str(branch_ids.tolist() if isinstance(branch_ids, Tensor) else branch_ids)
