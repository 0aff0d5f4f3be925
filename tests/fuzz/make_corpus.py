"""Write the seeds of the fuzz target again: `python tests/fuzz/make_corpus.py`."""

import json
import struct
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus" / "header"


def file(text: str, data: int = 0) -> bytes:
    """A file with this header and `data` zero bytes."""
    return struct.pack("<Q", len(text.encode())) + text.encode() + bytes(data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SEEDS = {
    "empty": file("{}"),
    "one": file(json.dumps({"a": entry("F32", [2], 0, 8)}), 8),
    "metadata": file(json.dumps({"__metadata__": {"format": "pt"}, "a": entry("BF16", [2, 3], 0, 12)}), 12),
    "two": file(json.dumps({"b": entry("F16", [1], 4, 6), "a": entry("U8", [4], 0, 4)}) + "   ", 6),
    "zero": file(json.dumps({"a": entry("F64", [0, 5], 0, 0), "s": entry("I64", [], 0, 8)}), 8),
    "narrow": file(json.dumps({"a": entry("F4", [4], 0, 2)}), 2),
    "overlap": file(json.dumps({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}), 6),
    "hole": file(json.dumps({"a": entry("U8", [4], 2, 6)}), 6),
    "twice": file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', 1),
    "huge": file(json.dumps({"a": entry("U8", [2**62, 4], 0, 0)})),
    "escape": file('{"\\u00fc\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "surrogate": file('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
}

if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS.items():
        (FOLDER / name).write_bytes(data)
        (FOLDER / f"{name}-text").write_bytes(data[8:].rstrip(b"\0"))
