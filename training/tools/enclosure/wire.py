"""Messages between the two sides of the door: a JSON header, then files as raw bytes.

    length of the header (8 bytes, big endian) | header | file 0 | file 1 | ...

The header's "files" lists [name, size] in order. Only the launcher and the trusted first process of the enclosure write
them; the program inside has neither end of the pipe.
"""

from __future__ import annotations

import json
import struct

TYPE_CHECKING = False  # as typing's, without the 10 ms that importing typing takes
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypedDict

    class Request(TypedDict):
        """The header of what a launcher reads."""

        limits: dict[str, float]
        argv: list[str]
        environment: dict[str, str]
        readable: list[str]
        links: list[tuple[str, str]]
        folder: str


Files = list[tuple[str, bytes]]
_LENGTH = struct.Struct(">Q")


def pack(header: Mapping[str, object], files: Sequence[tuple[str, bytes]]) -> bytes:
    """One message."""
    listed = {**header, "files": [[name, len(content)] for name, content in files]}
    encoded = json.dumps(listed).encode()
    return b"".join([_LENGTH.pack(len(encoded)), encoded, *(content for _, content in files)])


def unpack(message: bytes) -> tuple[dict, Files]:
    """Take one message apart.

    Raises:
        ValueError: it is cut, or no message.
    """
    if len(message) < _LENGTH.size:
        raise ValueError(f"a message of {len(message)} bytes is cut")
    (length,) = _LENGTH.unpack_from(message)
    position = _LENGTH.size + length
    header = json.loads(message[_LENGTH.size : position])
    files = []
    for name, size in header.pop("files"):
        content = message[position : position + size]
        if len(content) != size:
            raise ValueError(f"the file {name!r} is cut at {len(content)} of {size} bytes")
        files.append((name, content))
        position += size
    return header, files
