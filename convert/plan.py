"""What will be written: every shard, every tensor in it and where its bytes come from, before a byte is copied."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .checkpoint import SINGLE_FILE, StoredTensor
from .contents import Content
from .files import OpenFile
from .header import DTYPE_BITS, encode_header
from .strict_json import Json

WEIGHT_METADATA = {"format": "pt"}
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of an output shard: `content` goes to byte `offset` of the file."""

    name: str
    content: Content
    offset: int


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """An output file: `header`, then the tensors back to back."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.content.size for tensor in self.tensors)

    def runs(self) -> Iterator[tuple[StoredTensor, int, int] | PlannedTensor]:
        """What to do, in order: copies as long as can be (first, output offset, bytes), and tensors to compute."""
        run: tuple[StoredTensor, int, int] | None = None
        for tensor in self.tensors:
            content = tensor.content
            if not isinstance(content, StoredTensor):
                if run:
                    yield run
                run = None
                yield tensor
            elif run and run[0].file is content.file and run[0].offset + run[2] == content.offset:
                run = (run[0], run[1], run[2] + content.size)
            else:
                if run:
                    yield run
                run = (content, tensor.offset, content.size)
        if run:
            yield run


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A small output file: bytes to write, or a file to copy."""

    name: str
    """Path below the output directory, with '/'."""
    content: bytes | OpenFile

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.size


@dataclass(frozen=True, slots=True)
class Plan:
    """All that will be written, except what can only be known afterwards (index, model card, manifest: small)."""

    kind: str
    """`two-branch` or `dense`."""
    shards: tuple[PlannedShard, ...]
    files: tuple[PlannedFile, ...]
    fingerprint: str
    """Equal for the same sources and options: what `--resume` goes by."""
    notices: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of shards and files together."""
        return sum(shard.size for shard in self.shards) + sum(file.size for file in self.files)

    def index(self) -> bytes | None:
        """The text of the index, or None for a single file."""
        if [shard.name for shard in self.shards] == [SINGLE_FILE]:
            return None
        tensors = [(tensor, shard.name) for shard in self.shards for tensor in shard.tensors]
        total = {
            "total_parameters": sum(
                tensor.content.size * 8 // DTYPE_BITS[tensor.content.dtype] for tensor, _ in tensors
            ),
            "total_size": sum(tensor.content.size for tensor, _ in tensors),
        }
        weight_map = dict(sorted((tensor.name, shard) for tensor, shard in tensors))
        return json_bytes({"metadata": total, "weight_map": weight_map})


def lay_out(tensors: Iterable[tuple[str, Content]], max_shard_bytes: int) -> tuple[PlannedShard, ...]:
    """Distribute `tensors` over shards of at most `max_shard_bytes` of data (a larger tensor gets its own shard).

    The order given decides who shares a shard. Inside a shard wide elements come first, so that all are aligned, and
    then tensors follow the order of the source files, so that neighbours are copied in one go.
    """
    groups: list[list[tuple[str, Content]]] = []
    room = -1
    for name, content in tensors:
        if not groups or content.size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append((name, content))
        room -= content.size
    shards = []
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE_FILE
        group.sort(key=lambda item: _place(*item))
        shards.append(shard_of(file_name, group, WEIGHT_METADATA))
    return tuple(shards)


def shard_of(
    file_name: str, tensors: list[tuple[str, Content]], metadata: dict[str, str], header: bytes | None = None
) -> PlannedShard:
    """A shard that holds `tensors` in this order, under a header made for them or given."""
    if header is None:
        header = encode_header(((name, content.dtype, content.shape) for name, content in tensors), metadata)
    planned, offset = [], len(header)
    for name, content in tensors:
        planned.append(PlannedTensor(name=name, content=content, offset=offset))
        offset += content.size
    return PlannedShard(name=file_name, header=header, tensors=tuple(planned))


def fingerprint(parts: Json, shards: Iterable[PlannedShard], files: Iterable[PlannedFile]) -> str:
    """A digest of what will be written and from what: files by name, size, time and inode, not by content."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.name.encode() + b"\0" + shard.header)
        for tensor in shard.tensors:
            digest.update(json.dumps([tensor.name, tensor.content.identity()]).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0")
        digest.update(file.content if isinstance(file.content, bytes) else _file_identity(file.content).encode())
    return digest.hexdigest()[:32]


def file_identities(files: Iterable[OpenFile]) -> Json:
    """Name, size, time and inode of source files, for `fingerprint`."""
    return [_file_identity(file) for file in files]


def json_bytes(value: object) -> bytes:
    """How every JSON file of an output is spelled."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _file_identity(file: OpenFile) -> str:
    return f"{file.path}:{file.size}:{file.mtime_ns}:{file.inode}"


def _place(name: str, content: Content) -> tuple[int, int, str, int, str]:
    width = -DTYPE_BITS[content.dtype]
    if isinstance(content, StoredTensor):
        return (width, 0, str(content.file.path), content.offset, name)
    return (width, 1, "", 0, name)
