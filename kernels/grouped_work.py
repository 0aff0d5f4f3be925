"""What the grouped GEMMs share: how a persistent program finds its next tile, and how a launch is sized.

One grid covers both branches. Each program takes every `num_programs`-th piece of work from one list, tiles x column
blocks, so a mixed batch fills the card as one GEMM does, and a branch without rows has no work at all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_table import Config, table_for
from .plan import TilePlan

_HAS_DESCRIPTORS = hasattr(tl, "make_tensor_descriptor")


@triton.jit
def work_item(work, tiles_ptr, bound, num_tiles, num_blocks, GROUP: tl.constexpr):
    """(branch, first row, end of run, column block) of one piece of work.

    GROUP tiles walk down the columns together, so that a block of weights is read once per group while it is in L2.
    """
    per_group = GROUP * num_blocks
    group = work // per_group
    first = group * GROUP
    size = min(num_tiles - first, GROUP)
    within = work - group * per_group
    tile = first + within % size
    branch = tl.load(tiles_ptr + tile)
    row = tl.load(tiles_ptr + bound + tile)
    end = tl.load(tiles_ptr + 2 * bound + tile)
    return branch, row, end, within // size


def grid_size(plan: TilePlan, num_blocks: int, config: Config) -> int:
    """Programs to launch: `PER_SM` (default 1) per multiprocessor, but no more than there can be work."""
    bound = plan.bound * num_blocks
    if plan.tiles.device.type != "cuda":
        return min(bound, 3)  # interpreting: fewer than the work, so that the persistent loop turns
    multiprocessors = torch.cuda.get_device_properties(plan.tiles.device).multi_processor_count
    return min(bound, multiprocessors * config.get("PER_SM", 1))


def takes_descriptors(*tensors: Tensor | None) -> bool:
    """True if the copy engine (TMA) can address each: base and row stride of whole 16 bytes, contiguous columns."""
    if not _HAS_DESCRIPTORS:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
        if tensor is not None
    )


def choose(kernel: str, rows: int, hidden: int, features: int, operands: tuple[Tensor | None, ...]) -> Config:
    """The launch configuration of `kernel`: the table's, or its pointer form where TMA cannot address an operand."""
    first = next(tensor for tensor in operands if tensor is not None)
    table = table_for(first.device)
    config = table.find(kernel, hidden, features, first.dtype, rows)
    if config["variant"] == "tma" and not takes_descriptors(*operands):
        config = table.find(f"{kernel}_pointer", hidden, features, first.dtype, rows)
    return config


def split_config(config: Config) -> tuple[Config, dict[str, int]]:
    """(constexprs, launch options) of a configuration; `variant` and `PER_SM` are the host's."""
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in config.items() if name.isupper() and name != "PER_SM"}
    return constexprs, options


def set_descriptor_allocator() -> None:
    """Give Triton memory for descriptors made in a kernel, unless the user has given it some already."""
    from triton.runtime import _allocation

    current = _allocation._allocator
    current = current.get() if hasattr(current, "get") else current
    if not isinstance(current, _allocation.NullAllocator):
        return

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)
