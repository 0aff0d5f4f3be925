"""Fuzz the header reader: it accepts or raises CheckpointError, nothing else, and what it accepts the library reads alike.

    python tests/fuzz/fuzz_header.py -max_total_time=60 tests/fuzz/corpus/header

Needs atheris (`pip install atheris`; Python 3.11 and 3.12). Options are libFuzzer's. New inputs are added to the first
folder; an input that fails is written to the working directory as crash-...
"""

import os
import re
import struct
import sys

import atheris

with atheris.instrument_imports(include=["metis_home.convert.header", "metis_home.convert.strict_json"]):
    from metis_home.convert import header, strict_json  # noqa: F401

from safetensors import deserialize

from metis_home.errors import CheckpointError


def test_one_input(data: bytes) -> None:
    """Read `data` as a file; where it begins like JSON, as the header of one."""
    if data[:1] == b"{":
        numbers = [int(digits) for digits in re.findall(rb"\d{1,4}", data)]
        data = struct.pack("<Q", len(data)) + data + bytes(max(numbers, default=0))
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        try:
            found = header.read_header(fd, "fuzz")
        except CheckpointError:
            return
    finally:
        os.close(fd)
    expected = {name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in deserialize(data)}
    assert {e.name: (e.dtype, e.shape, e.end - e.begin) for e in found.entries} == expected
    assert found.data_start + sum(entry.end - entry.begin for entry in found.entries) == len(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
