"""Messages between the two sides of the door: a JSON header, then files as raw bytes.

    length of the header (8 bytes, big endian) | header | file 0 | file 1 | ...

The header's "files" lists [name, size] in order. Only the launcher and the trusted first process of the enclosure write
them; the program inside has neither end of the pipe.
"""

import json
import struct
from collections.abc import Sequence

_LENGTH = struct.Struct(">Q")

Header = dict[str, object]
Files = list[tuple[str, bytes]]


def pack(header: Header, files: Sequence[tuple[str, bytes]]) -> bytes:
    """One message."""
    listed = {**header, "files": [[name, len(content)] for name, content in files]}
    encoded = json.dumps(listed).encode()
    return b"".join([_LENGTH.pack(len(encoded)), encoded, *(content for _, content in files)])


def unpack(message: bytes) -> tuple[Header, Files]:
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
