"""The header of a safetensors file: read with suspicion, written exactly.

    8 bytes   length of the header, unsigned, little endian
    header    JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {str: str}}
    data      the tensors, back to back

Offsets count from the start of the data, in bytes. A file is accepted only if the tensors cover its data from the first
byte to the last, without hole or overlap; then a byte range is a tensor and nothing else.

Stricter than the safetensors library, with which it otherwise agrees (tests/convert/test_header_differential.py):
repeated names, unknown fields beside the three, sizes from 2**63 and headers above 16 MiB are refused.
Source: https://huggingface.co/docs/safetensors, section Format.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from ..errors import CheckpointError
from .strict_json import Json, parse_json

# A 72B model with two branches needs 0.2 MB; JSON of 16 MiB costs some 200 MB to parse, 100 MB (the format's own
# bound) would cost more than a gigabyte.
MAX_HEADER_BYTES = 16 * 2**20
_MAX_NUMBER = 2**63 - 1
METADATA_KEY = "__metadata__"

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was checked. `entries` are in the order of their bytes; `raw` are the first bytes of the file."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """Where the data begins, bytes from the start of the file."""
        return len(self.raw)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises ValueError for an unknown dtype or a size that is no whole number of bytes."""
    bits = prod(shape) * DTYPE_BITS[dtype] if dtype in DTYPE_BITS else -1
    if bits < 0 or bits % 8:
        raise ValueError(f"{dtype} {list(shape)} is no whole number of bytes")
    return bits // 8


def read_header(fd: int, label: str) -> Header:
    """Read and check the header of the open file `fd`.

    Raises:
        CheckpointError: anything that does not follow the format; `label` names the file.
    """
    size = os.fstat(fd).st_size
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise CheckpointError(f"{label}: {size} bytes are too few for a safetensors file. Is the download complete?")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{label}: the header claims {length} bytes, more than the {MAX_HEADER_BYTES} any real one needs. "
            "Is this a safetensors file?"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{label}: the header claims {length} bytes, the file has {size}. Is the download complete?"
        )
    raw = start + os.pread(fd, length, 8)
    return parse_header(raw, size, label)


def parse_header(raw: bytes, file_size: int | None, label: str) -> Header:
    """Check a header against the size of its file.

    Args:
        raw: the first `8 + length` bytes of the file.
        file_size: size of the whole file, bytes; None: a header that was kept without its data.
        label: names the file in errors.
    Raises:
        CheckpointError: what is wrong, and where.
    """
    if raw[8:9] != b"{":
        raise CheckpointError(f"{label}: the header does not start with '{{'. Is this a safetensors file?")
    fields = parse_json(raw[8:], f"{label}: header", parse_int=_unsigned)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{label}: the header is no JSON object.")
    metadata = _metadata(fields.pop(METADATA_KEY, None), label)
    entries = sorted((_entry(name, info, label) for name, info in fields.items()), key=lambda e: (e.begin, e.end))

    position = 0
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{label}: {entry.name!r} {what}: it begins at byte {entry.begin}, expected {position}. "
                "The file is damaged or forged."
            )
        position = entry.end
    expected = len(raw) + position
    if file_size is not None and expected != file_size:
        raise CheckpointError(
            f"{label}: header and tensors make {expected} bytes, the file has {file_size}. Is the download complete?"
        )
    return Header(entries=tuple(entries), metadata=metadata, raw=raw)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file that holds `tensors` (name, dtype, shape) back to back in this order.

    Padded with spaces to a multiple of 8 bytes, so that the data is aligned.
    """
    fields: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unsigned(digits: str) -> int:
    # "-0" too: other readers take it for a float and refuse it.
    if digits.startswith("-"):
        raise ValueError(f"negative number {digits}")
    value = int(digits) if len(digits) < 20 else _MAX_NUMBER + 1
    if value > _MAX_NUMBER:
        raise ValueError(f"the number {digits[:24]} is larger than 2**63 - 1")
    return value


def _metadata(value: Json, label: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{label}: {METADATA_KEY} must map strings to strings.")
    return {key: str(text) for key, text in value.items()}


def _entry(name: str, info: Json, label: str) -> TensorEntry:
    where = f"{label}: tensor {name!r}"
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        found = sorted(info) if isinstance(info, dict) else type(info).__name__
        raise CheckpointError(f"{where}: expected the fields dtype, shape and data_offsets, found {found}.")
    dtype, shape, offsets = info["dtype"], _integers(info["shape"]), _integers(info["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}. Known: {', '.join(DTYPE_BITS)}.")
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape and data_offsets must be lists of whole numbers, the latter of two.")
    begin, end = offsets
    count = 1
    for length in shape:  # in this order, as a reader with 64-bit numbers multiplies: huge * 0 overflows there as well
        count *= length
        if count > _MAX_NUMBER:
            raise CheckpointError(f"{where}: shape {list(shape)} has more elements than 2**63 - 1.")
    bits = count * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} needs {bits / 8:g} bytes, data_offsets {list(offsets)} give {end - begin}."
        )
    return TensorEntry(name=name, dtype=dtype, shape=shape, begin=begin, end=end)


def _integers(value: Json) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = tuple(item for item in value if type(item) is int)  # bool is an int to isinstance
    return numbers if len(numbers) == len(value) else None
