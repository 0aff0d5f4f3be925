"""The policy's weights as a dense checkpoint on disk, for an engine that runs elsewhere.

    model (two branches, sharded, with adapters) --one tensor at a time--> folder/v000003/*.safetensors (hub names)

Of a two-branch model it is the dense model of one branch: what `metis_home.convert.split` makes of it. Sharded
parameters (ZeRO-3, FSDP2) are gathered one by one, so no process ever holds the model twice; rank 0 writes. A version
appears by rename when it is complete.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metis_home.branch import Branch
from metis_home.errors import EngineError
from metis_home.names import dense_name_of, to_hub_name

from .. import collectives

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
# Models whose checkpoints are named otherwise than their modules; Qwen3-VL's are not.
_HUB_LAYOUT = ("metis_home", "qwen2_5_vl", "qwen2_vl")
_UNIT = re.compile(r"^(?:model\.(?:language_model\.)?layers\.\d+|(?:model\.)?visual)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedWeights:
    """A version of the weights on disk."""

    folder: Path
    version: int
    tensors: int
    bytes: int


def export_weights(
    model: nn.Module,
    root: Path,
    *,
    version: int,
    branch: Branch | None = None,
    dtype: torch.dtype | None = None,
    only_trained: bool = False,
    max_shard_bytes: int = 2 << 30,
) -> ExportedWeights | None:
    """Write the dense model of `branch` to `root`/v<version>. All ranks call it together; rank 0 writes.

    Args:
        model: unwrapped; sharded or whole, with LoRA adapters (merged into what is written) or without.
        root: a directory that the engine can read, too.
        branch: of a two-branch model; None for a dense one.
        dtype: of the written tensors; None: as they are.
        only_trained: leave out layers of which nothing trains. Layers are written whole: engines fuse gate with up, and
            q with k and v, and a fused weight of which one part comes is silently wrong.
        max_shard_bytes: of a file, unless a tensor is larger.
    Returns:
        What was written, on rank 0; None on the others.
    Raises:
        EngineError: branch and model do not fit, adapters of an unknown kind, nothing to write, or a disk that is full.
    """
    names = exported_names(model, branch, only_trained=only_trained)
    if not names:
        raise EngineError("there are no weights to export: nothing of this model trains")
    folder = Path(root) / f"v{version:06d}"
    writer = _ShardWriter(folder, max_shard_bytes) if collectives.rank() == 0 else None
    for hub_name, tensor in _tensors(model, names):  # to the end, whatever fails: the other ranks gather, too
        if writer is not None:
            writer.add(hub_name, tensor, dtype or tensor.dtype)
    if writer is None:
        return None
    writer.finish()
    return ExportedWeights(folder=folder, version=version, tensors=writer.tensors, bytes=writer.bytes)


def exported_names(model: nn.Module, branch: Branch | None, *, only_trained: bool = False) -> dict[str, str]:
    """Parameter name -> name in the dense checkpoint, of all that is exported. Adapters' own parameters are left out.

    Raises:
        EngineError: a two-branch model without a branch, or a dense one with.
    """
    config: Any = model.config
    if (config.model_type == "metis_home") != (branch is not None):
        raise EngineError(
            f"the model is a {config.model_type} and the branch to export is {branch!r}. Two-branch models need one; "
            "dense models have none."
        )
    found: dict[str, str] = {}
    trained: set[str] = set()
    for name, parameter in model.named_parameters():
        plain = _without_adapter(name)
        dense = plain if branch is None else dense_name_of(plain, branch)
        if dense is None:
            continue
        hub_name = to_hub_name(dense) if config.model_type in _HUB_LAYOUT else dense
        if parameter.requires_grad:
            trained.add(_unit(hub_name))
        if not _is_adapter(name):
            found[name] = hub_name
    return {name: hub for name, hub in found.items() if not only_trained or _unit(hub) in trained}


def remove_other_versions(root: Path, keep: int) -> None:
    """Delete all versions but one."""
    for folder in Path(root).glob("v[0-9]*"):
        if folder.name != f"v{keep:06d}":
            shutil.rmtree(folder, ignore_errors=True)


def _unit(hub_name: str) -> str:
    """What is written together or not at all: a decoder layer, the vision tower, or a tensor outside of both."""
    match = _UNIT.match(hub_name)
    return match[0] if match else hub_name


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".original_module." in name


def _without_adapter(name: str) -> str:
    """`...q_proj.base_layer.weight` -> `...q_proj.weight`; `...q_proj.lora_A.default.weight` -> the same layer's."""
    name = re.sub(r"\.modules_to_save\.\w+\.", ".", name)
    return re.sub(r"\.lora_\w+\..*$", ".weight", name).replace(".base_layer.", ".")


def _tensors(model: nn.Module, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, whole tensor); every rank meets them in the same order."""
    parameters = dict(model.named_parameters())
    for name, hub_name in names.items():
        owner_name, _, kind = name.rpartition(".")
        adapted = _adapted_module(model, owner_name) if kind == "weight" else None
        if adapted is None:
            with _gathered([parameters[name]]):
                yield hub_name, _whole(parameters[name])
        else:
            with torch.no_grad(), _gathered(list(adapted.parameters())):
                yield hub_name, _whole(parameters[name]) + _delta(adapted, hub_name)


def _adapted_module(model: nn.Module, owner_name: str) -> Any | None:
    """The adapter's module around a linear layer, if its adapter is on."""
    if not owner_name.endswith(".base_layer"):
        return None
    module: Any = model.get_submodule(owner_name.removesuffix(".base_layer"))
    if not hasattr(module, "get_delta_weight") or (getattr(module, "use_dora", None) and any(module.use_dora.values())):
        raise EngineError(
            f"{owner_name}: an adapter of the kind {type(module).__name__} (DoRA: {getattr(module, 'use_dora', None)}) "
            "cannot be merged into exported weights. Expected LoRA."
        )
    return None if module.disable_adapters or module.merged else module


def _delta(module: Any, hub_name: str) -> Tensor:
    if any(hasattr(parameter, "full_tensor") for parameter in module.parameters()):
        raise EngineError(
            f"{hub_name}: LoRA under FSDP2 cannot be exported to a server. Use ZeRO-3, DDP or full weights."
        )
    known = {*module.lora_A, *module.lora_embedding_A}
    deltas = [module.get_delta_weight(name) for name in module.active_adapters if name in known]
    return torch.stack(deltas).sum(0) if deltas else torch.zeros(())


def _gathered(parameters: list[Any]) -> AbstractContextManager[object]:
    """A context in which ZeRO-3's parameters are whole on every rank; others are left alone."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _whole(parameter: Any) -> Tensor:
    """All of an FSDP2 parameter (a collective); any other as it is."""
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class _ShardWriter:
    """Collects tensors and writes them in files; the folder appears by rename. Errors are kept until `finish`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.partial = folder.with_name(folder.name + ".partial")
        self.files: dict[str, str] = {}
        self.bytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._problem: Exception | None = None

    @property
    def tensors(self) -> int:
        return len(self.files) + len(self._held)

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if self._problem is not None:
            return
        size = tensor.numel() * dtype.itemsize
        if self._held and self._held_bytes + size > self.max_bytes:
            self._write()
        # A copy: the parameter goes on changing, or is given back to the other ranks.
        self._held[name] = tensor.to("cpu", dtype, copy=True).contiguous()
        self._held_bytes += size

    def finish(self) -> None:
        """Raises:
        EngineError: something could not be written.
        """
        self._write()
        if self._problem is None:
            try:
                index = {"metadata": {"total_size": self.bytes}, "weight_map": self.files}
                (self.partial / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
                shutil.rmtree(self.folder, ignore_errors=True)
                os.replace(self.partial, self.folder)
            except OSError as error:
                self._problem = error
        if self._problem is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise EngineError(f"{self.folder}: weights for the server cannot be written: {self._problem}")

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self.files:
            shutil.rmtree(self.partial, ignore_errors=True)
        name = f"model-{len(set(self.files.values())) + 1:05d}.safetensors"
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            save_file(self._held, self.partial / name, {"format": "pt"})
            (self.partial / name).chmod(0o644)  # the server may be another user
        except (OSError, SafetensorError) as error:
            self._problem = error
        self.files |= dict.fromkeys(self._held, name)
        self.bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0
