"""The few things that ranks tell each other while they train by rewards. With one process, all of them are no-ops.

Every rank must call each of these equally often and in the same order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if _is_on() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _is_on() else 0


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Add up each value over all ranks, in float64."""
    return _reduce(values, "sum")


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest of each value over all ranks."""
    return _reduce(values, "max")


def sum_dicts(values: Mapping[str, float]) -> dict[str, float]:
    """Add up dicts that have the same keys on every rank; keys ending in `_max` take the largest value instead."""
    names = sorted(values)
    added = [name for name in names if not name.endswith("_max")]
    largest = [name for name in names if name.endswith("_max")]
    totals = dict(zip(added, sum_over_ranks([values[name] for name in added]), strict=True))
    return totals | dict(zip(largest, max_over_ranks([values[name] for name in largest]), strict=True))


def gather(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks; any picklable value."""
    if not _is_on():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _reduce(values: Sequence[float], how: str) -> list[float]:
    if not _is_on() or not values:
        return [float(value) for value in values]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def _is_on() -> bool:
    return dist.is_available() and dist.is_initialized()
