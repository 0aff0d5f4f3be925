"""Generating with a sharded model: gather its parameters once, instead of once per layer and token.

Ranks generate different prompts and stop after different numbers of tokens. Under ZeRO-3 and FSDP2 every forward gathers
parameters with collectives, which all ranks must issue equally often: ranks that generate on their own would wait for
each other for ever. So all ranks gather all parameters, generate without a single collective, and give them back.
It needs room for the whole model on every device while it lasts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Within it, every rank has every parameter, and forwards of `model` issue no collectives.

    All ranks must enter and leave it together. Models that are not sharded are left alone.

    Args:
        model: what the trainer runs: DeepSpeed's engine, a model that FSDP2 shards, or any other.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        with _whole_zero3(model):
            yield
    elif any(hasattr(module, "unshard") for module in model.modules()):
        with _whole_fsdp2(model):
            yield
    else:
        yield


@contextmanager
def _whole_zero3(engine: nn.Module) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        # Its hooks would gather and release layer by layer, and would learn the order of generation's forwards.
        offload: Any = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
        if offload is None:  # partitioned but not yet trained: no hooks
            yield
            return
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


@contextmanager
def _whole_fsdp2(model: nn.Module) -> Iterator[None]:
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    reshards = [_reshards_after_forward(unit) for unit in units]
    # Before the first forward: the outermost unit must find the others untouched when it sets them up.
    units[0]._get_fsdp_state()._lazy_init()
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit, is_on in zip(units, reshards, strict=True):
            unit.set_reshard_after_forward(is_on, recurse=False)
            unit.reshard()
            # Backward gathers ahead what ran before in the recorded order. What ran here differs among ranks (images,
            # lengths): with it at the end of the order, ranks would gather different units at the same time.
            for group in _groups(unit):
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()


def _reshards_after_forward(unit: Any) -> bool:
    return any(group.post_forward_mesh_info is not None for group in _groups(unit))


def _groups(unit: Any) -> list[Any]:
    """The parameter groups of one unit; none where all its parameters belong to inner units."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch < 2.13
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
