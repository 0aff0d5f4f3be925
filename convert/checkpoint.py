"""A directory of safetensors files: which tensor is where, byte for byte. Knows nothing about models."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ..errors import CheckpointError
from .files import OpenFile, open_inside
from .header import Header, read_header
from .strict_json import Json, parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READ_STEP = 2**20  # bytes
_READ_AHEAD_STEPS = 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: `size` bytes at `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: OpenFile
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, at most 1 MiB at a time.

        Raises:
            CheckpointError: the file became shorter.
        """
        for number, position in enumerate(range(self.offset, self.offset + self.size, READ_STEP)):
            if number % _READ_AHEAD_STEPS == 0 and self.size > READ_STEP:
                # the kernel's own read-ahead is 128 KiB: too little to keep a disk busy while numbers are computed
                self.file.will_need(position, 2 * _READ_AHEAD_STEPS * READ_STEP)
            yield self.file.read_range(position, min(READ_STEP, self.offset + self.size - position))

    def identity(self) -> list[Json]:
        """What this is made of, for the fingerprint of a plan."""
        return ["stored", self.file.name, self.offset, self.size]


@dataclass(slots=True)
class Checkpoint:
    """An open checkpoint directory. Use as a context manager: it holds the files open.

    `tensors` are in the order of the shards and of the bytes in them, under the names that the files have.
    """

    path: Path
    shards: dict[str, OpenFile] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    small_files: dict[str, OpenFile] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    """Files and folders that are not read: other formats, other weights, code."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for file in (*self.shards.values(), *self.small_files.values()):
            with contextlib.suppress(OSError):
                os.close(file.fd)

    def read_object(self, name: str) -> dict[str, Json]:
        """The JSON object in the small file `name`.

        Raises:
            CheckpointError: it is missing or no JSON object.
        """
        if name not in self.small_files:
            raise CheckpointError(f"{self.path} has no {name}. Is this a checkpoint directory, and is it complete?")
        return parse_object(self.small_files[name].read(), f"{self.path / name}")

    def check_unchanged(self) -> None:
        """Raise CheckpointError when a file is no longer what was opened."""
        for file in (*self.shards.values(), *self.small_files.values()):
            file.check_unchanged()


def open_checkpoint(directory: Path, *, weights: bool = True) -> Checkpoint:
    """Open the checkpoint in `directory` and check its index and headers; reads no tensor.

    Args:
        directory: holds `config.json` and safetensors files.
        weights: False opens only the small files.
    Raises:
        CheckpointError: no such directory, no safetensors weights, an index that does not fit the files, a damaged
            header, a file that leads outside.
    """
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise CheckpointError(
            f"{directory} {what}. Give a checkpoint directory or a hub id such as 'Qwen/Qwen2.5-VL-7B-Instruct'."
        )
    checkpoint = Checkpoint(path=directory)
    try:
        _open_small_files(checkpoint)
        if weights:
            _open_shards(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _open_small_files(checkpoint: Checkpoint) -> None:
    for entry in sorted(os.scandir(checkpoint.path), key=lambda e: e.name):
        weights = entry.name.endswith((".safetensors", ".gguf", ".onnx", ".msgpack", ".h5", *_PICKLES))
        if entry.name.startswith(".") or entry.is_dir() or weights:
            if not entry.name.endswith(".safetensors"):
                checkpoint.ignored.append(entry.name)
            continue
        checkpoint.small_files[entry.name] = open_inside(checkpoint.path, entry.name)


def _open_shards(checkpoint: Checkpoint) -> None:
    directory = checkpoint.path
    present = {entry.name for entry in os.scandir(directory) if entry.name.endswith(".safetensors")}
    has_index = INDEX_FILE in checkpoint.small_files
    if has_index and SINGLE_FILE in present:
        raise CheckpointError(
            f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}: loaders would take the single file and ignore the "
            "shards. Remove the one that is out of date."
        )
    if not has_index and SINGLE_FILE not in present:
        pickles = sorted(name for name in checkpoint.ignored if name.endswith(_PICKLES))
        if pickles:
            raise CheckpointError(
                f"{directory} has only pickled weights ({pickles[0]}), which can run code when opened and are never "
                "read here. Save the model as safetensors first: model.save_pretrained(DIR)."
            )
        some = f"; found {sorted(present)[0]!r} without an index" if present else ""
        raise CheckpointError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{some}. Is the download complete?"
        )

    weight_map = _weight_map(checkpoint) if has_index else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    checkpoint.ignored.extend(sorted(present - set(names)))
    for name in names:
        file = open_inside(directory, name)
        checkpoint.shards[name] = file
        header = read_header(file.fd, str(directory / name))
        checkpoint.headers[name] = header
        for entry in header.entries:
            if entry.name in checkpoint.tensors:
                first = checkpoint.tensors[entry.name].file.name
                raise CheckpointError(f"{directory}: {entry.name!r} is in {first} and in {name}. Save the model again.")
            checkpoint.tensors[entry.name] = StoredTensor(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                file=file,
                offset=header.data_start + entry.begin,
                size=entry.end - entry.begin,
            )
    if weight_map is not None:
        _check_index(checkpoint, weight_map)


def _weight_map(checkpoint: Checkpoint) -> dict[str, str]:
    label = str(checkpoint.path / INDEX_FILE)
    weight_map = checkpoint.read_object(INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label}: 'weight_map' must be an object that names the shard of each tensor.")
    checked = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{label}: {tensor!r} is said to be in {shard!r}, which is no .safetensors file name."
            )
        checked[tensor] = shard
    return checked


def _check_index(checkpoint: Checkpoint, weight_map: dict[str, str]) -> None:
    label = str(checkpoint.path / INDEX_FILE)
    for tensor, shard in weight_map.items():
        found = checkpoint.tensors.get(tensor)
        if found is None or found.file.name != shard:
            where = f"it is in {found.file.name}" if found else "it is in no shard"
            raise CheckpointError(f"{label} says that {tensor!r} is in {shard}; {where}. Is the download complete?")
    for tensor, stored in checkpoint.tensors.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{label} does not name {tensor!r}, which is in {stored.file.name}. Shards of two saves are mixed "
                "here; save or download the model again."
            )
