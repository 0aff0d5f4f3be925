"""The router's place in a checkpoint directory: where its tensors lie, and how they are replaced without touching others.

A shard is a file of one header and many tensors. Replacing a tensor by one of the same type and shape moves nothing, so
the shard is copied, patched and renamed over the old one: every other byte stays what it was, and a crash leaves either
the old file or the new one. The converter's manifest, if there is one, gets the new digests.
"""

import json
import logging
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ...errors import CheckpointError
from ...link_bundle import is_bundle, tensor_places
from ...names import ROUTER_PREFIX, to_hub_name

logger = logging.getLogger(__name__)

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_CONFIG_FILE, _CARD_FILE, _MANIFEST_FILE = "config.json", "README.md", "metis_home_manifest.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# What the converter's model card says of a router that nobody trained.
_UNTRAINED_NOTICE = "**The router is new and untrained**: force a branch until it is trained."
_TRAINED_NOTICE = "The router is trained."
_STEP = 16 * 2**20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file: its name there, type and shape, and the bytes [begin, end) of the file."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_tensors(directory: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """{name in the hub layout: where it lies} of all tensors of a two-branch directory or link bundle.

    Raises:
        CheckpointError: there are no safetensors files, or they cannot be read.
    """
    root = Path(directory)
    if is_bundle(root):
        places = tensor_places(root)
        headers = {file: _header(file) for file in {place.file for place in places.values()}}
        return {name: headers[place.file][place.key] for name, place in places.items()}
    found: dict[str, StoredTensor] = {}
    for file in _weight_files(root):
        found.update({to_hub_name(name): tensor for name, tensor in _header(file).items()})
    return found


def replace_router(directory: str | os.PathLike[str], router: Mapping[str, Tensor]) -> None:
    """Put a trained router into the checkpoint and say in its config that it is trained.

    Args:
        directory: a two-branch directory or link bundle; a file that is a link into a cache is replaced by a real one.
        router: {name inside the router: tensor}, all of the router's tensors.
    Raises:
        CheckpointError: the checkpoint has another router (names or shapes). OSError: it cannot be written.
    """
    root = Path(directory)
    stored = {
        name[len(ROUTER_PREFIX) :]: t for name, t in stored_tensors(root).items() if name.startswith(ROUTER_PREFIX)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in router.items()}
    if {name: tensor.shape for name, tensor in stored.items()} != wanted:
        raise CheckpointError(
            f"{root} has the router tensors { {name: t.shape for name, t in stored.items()} }, the trained router has "
            f"{wanted}. Train the router that belongs to this checkpoint."
        )
    lossy = sorted({tensor.dtype for tensor in stored.values()} - {"F32", "F64"})
    if lossy:
        logger.warning("%s stores its router as %s: the trained float32 values are rounded", root, ", ".join(lossy))
    for file in sorted({tensor.file for tensor in stored.values()}):
        patches = {tensor.begin: _bytes(router[name], tensor) for name, tensor in stored.items() if tensor.file == file}
        _replace(file, patches)
    changed = [root / _CONFIG_FILE] if _mark_trained(root / _CONFIG_FILE) else []
    if _replace_text(root / _CARD_FILE, _UNTRAINED_NOTICE, _TRAINED_NOTICE):
        changed.append(root / _CARD_FILE)
    _update_manifest(root, stored, changed)


def _weight_files(root: Path) -> list[Path]:
    if (root / _SINGLE_FILE).is_file():
        return [root / _SINGLE_FILE]
    try:
        names = sorted(set(json.loads((root / _INDEX_FILE).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{root} has neither {_SINGLE_FILE} nor a readable {_INDEX_FILE} ({error}). Pass a two-branch directory, as "
            "`metis-home convert` or save_pretrained write it."
        ) from error
    return [root / name for name in names]


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes length, that much JSON, then the data."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes in a file of {file.stat().st_size}")
            entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        return {
            name: StoredTensor(
                file,
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def _bytes(tensor: Tensor, stored: StoredTensor) -> bytes:
    if stored.dtype not in _DTYPES:
        raise CheckpointError(f"{stored.file}: the router is stored as {stored.dtype}, which cannot be trained.")
    return tensor.detach().cpu().to(_DTYPES[stored.dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def _replace(file: Path, patches: Mapping[int, bytes]) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(file, unfinished)
        shutil.copymode(file, unfinished)
        with unfinished.open("r+b") as opened:
            for offset, data in patches.items():
                opened.seek(offset)
                opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_text(file: Path, text: str) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _mark_trained(file: Path) -> bool:
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("router_trained") is True:
        return False
    config["router_trained"] = True
    _write_text(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return True


def _replace_text(file: Path, old: str, new: str) -> bool:
    if not file.is_file() or old not in (text := file.read_text(encoding="utf-8")):
        return False
    _write_text(file, text.replace(old, new))
    return True


def _update_manifest(root: Path, router: Mapping[str, StoredTensor], changed: list[Path]) -> None:
    path = root / _MANIFEST_FILE
    if not path.is_file():
        return
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for file in sorted({tensor.file for tensor in router.values()}):
        entry = manifest.get("shards", {}).get(file.name)
        if entry is not None:
            entry["xxh3_128"] = _digest(file, 0, file.stat().st_size)
            for name, tensor in router.items():
                if tensor.file == file:
                    entry["tensors"][ROUTER_PREFIX + name] = _digest(file, tensor.begin, tensor.end)
    for file in changed:
        if file.name in manifest.get("files", {}):
            entry = manifest["files"][file.name]
            entry |= {"size": file.stat().st_size, "xxh3_128": _digest(file, 0, file.stat().st_size)}
    _write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _digest(file: Path, begin: int, end: int) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        opened.seek(begin)
        while begin < end:
            piece = opened.read(min(_STEP, end - begin))
            digest.update(piece)
            begin += len(piece)
    return digest.hexdigest()
