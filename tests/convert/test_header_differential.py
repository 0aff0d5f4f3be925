"""Our header reader against the safetensors library, on valid files and on broken ones."""

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from metis_home.convert.header import DTYPE_BITS, encode_header, read_header
from metis_home.errors import CheckpointError

FOLDER = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
# What the library can show in numpy-free terms; the rest are compared by acceptance only.
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3)
WHOLE_BYTES = sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)


def ours(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return {entry.name: (entry.dtype, list(entry.shape)) for entry in read_header(fd, "x").entries}
    except CheckpointError:
        return None
    finally:
        os.close(fd)


def theirs(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError):
        return None


def stricter_on_purpose(data: bytes) -> bool:
    """Repeated names, unknown fields, numbers (or products before a 0) from 2**63: accepted there, refused here."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        repeated = []

        def pairs(items: list) -> dict:
            keys = [key for key, _ in items]
            repeated.extend(key for key in keys if keys.count(key) > 1)
            return dict(items)

        header = json.loads(data[8 : 8 + length], object_pairs_hook=pairs)
    except (ValueError, struct.error, RecursionError):
        return False
    fields = [set(v) for k, v in header.items() if k != "__metadata__" and isinstance(v, dict)]
    huge = False
    for entry in header.values():
        product = 1
        for number in entry.get("shape") or [] if isinstance(entry, dict) else []:
            product *= number if isinstance(number, int) else 1
            huge |= product >= 2**63 or (isinstance(number, int) and number >= 2**63)
    return bool(repeated or huge) or any(f > {"dtype", "shape", "data_offsets"} for f in fields)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    header: dict = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    position = 0
    for name in draw(st.lists(names, unique=True, max_size=5)):
        dtype, shape = draw(st.sampled_from(WHOLE_BYTES)), draw(shapes)
        size = DTYPE_BITS[dtype] // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    items = draw(st.permutations(list(header.items())))
    text = json.dumps(dict(items), ensure_ascii=draw(st.booleans())).encode() + b" " * draw(st.integers(0, 9))
    return struct.pack("<Q", len(text)) + text + bytes(position)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A valid file after a few edits: bytes, numbers or fields of its header, or its length."""
    data = draw(files())
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw(st.sampled_from(["bytes", "cut", "grow", "length", "json", "text"]))
    if kind == "bytes":
        edited = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            edited[draw(st.integers(0, min(len(data) - 1, 8 + length)))] = draw(st.integers(0, 255))
        return bytes(edited)
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "grow":
        return data + b"\0" * draw(st.integers(1, 3))
    if kind == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length))) + data[8:]
    text = data[8 : 8 + length].decode()
    if kind == "text":
        old, new = draw(
            st.sampled_from(
                [
                    ("[0", "[-0"),
                    ("0", "00"),
                    ("[", "[1e0,"),
                    (":", "::"),
                    ('"shape":', '"shape":null,"x":'),
                    ("}", "},"),
                    ("F32", "F33"),
                    ("[0", "[0.0"),
                    ("{", "{ "),
                    ('"', "'"),
                    ("[0", "[18446744073709551615"),
                    ("}", "}}"),
                    ('"shape"', '"dtype"'),
                    ('"F', '"\\ud800F'),
                    ("[0", "[9223372036854775808"),
                    ("{", "\ufeff{"),
                    ("[", "[0,"),
                ]
            )
        )
        text = text.replace(old, new, 1)
    else:
        header = json.loads(text)
        if entries := [value for key, value in header.items() if key != "__metadata__"]:
            entry = draw(st.sampled_from(entries))
            field = draw(st.sampled_from(["shape", "data_offsets", "dtype"]))
            numbers = st.lists(st.integers(-2, 2**65) | st.integers(0, 64), max_size=3)
            entry[field] = draw(numbers) if field != "dtype" else draw(st.sampled_from(sorted(DTYPE_BITS)))
        text = json.dumps(header)
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=files())
def test_valid_files_are_read_alike(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=FOLDER) as file:
        file.write(data)
        file.flush()
        found = ours(Path(file.name))

        assert found is not None
        assert found == theirs(Path(file.name))


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=broken())
def test_broken_files_are_refused_alike(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=FOLDER) as file:
        file.write(data)
        file.flush()
        found, expected = ours(Path(file.name)), theirs(Path(file.name))

        if found is None and expected is not None:
            assert stricter_on_purpose(data)
        else:
            assert found == expected


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = [("a", "F32", (2, 3)), ('ü"\n', "BF16", (5,)), ("empty", "F16", (0, 4)), ("scalar", "F32", ())]
    header = encode_header(tensors, {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(24 + 10 + 0 + 4))

    found = theirs(tmp_path / "x.safetensors")

    assert found == {name: (dtype, list(shape)) for name, dtype, shape in tensors}
    assert len(header) % 8 == 0


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_narrower_than_a_byte_are_counted_in_bits(dtype: str, tmp_path: Path) -> None:
    bits = DTYPE_BITS[dtype]
    text = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(bits))

    assert ours(path) == {"a": (dtype, [8])}
