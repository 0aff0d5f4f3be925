"""Bytes that one rank really holds: the sizes of its tensors."""

from collections.abc import Iterable

from torch import Tensor


def weight_bytes(trainer) -> int:
    """This rank's share of the weights."""
    total = 0
    for parameter in trainer.model.parameters():
        if getattr(parameter, "ds_tensor", None) is not None:
            total += parameter.ds_tensor.nbytes
        else:
            total += _local(parameter).nbytes
    return total


def gradient_bytes(trainer) -> int:
    """This rank's share of the gradients, when the optimizer is about to use them."""
    sharded = getattr(trainer.model_wrapped, "optimizer", None)
    if hasattr(sharded, "averaged_gradients"):  # DeepSpeed
        return sum(_bytes(part) for part in sharded.averaged_gradients.values() if part is not None)
    return sum(_local(p.grad).nbytes for p in trainer.model.parameters() if p.grad is not None)


def optimizer_bytes(trainer) -> int:
    """This rank's share of moments and master weights."""
    sharded = getattr(trainer.model_wrapped, "optimizer", None)
    masters: Iterable[Tensor] | None
    if sharded is not None:  # DeepSpeed
        inner = sharded.optimizer
        masters = getattr(sharded, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        if masters is None:
            masters = sharded.single_partition_of_fp32_groups
    else:
        inner, masters = trainer.optimizer, []
    inner = getattr(inner, "optimizer", inner)
    moments = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _bytes(masters) + _bytes(moment for moment in moments if moment.dim())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(_local(tensor).nbytes for tensor in tensors if tensor is not None)
