"""Records back to rows of a file, so that what one step makes the next one reads, wherever it is moved."""

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from metis_home.branch import Branch

from ..data.formats import mode_name

if TYPE_CHECKING:
    from ..data.records import Record

IMAGE_FOLDER = "images"


def portable_row(record: "Record", out: Path) -> dict[str, object]:
    """The row of a JSONL file `out` that reads as `record`, without its response.

    Paths become relative to the file; images that are in memory are written beside it, once each, named by content.
    """
    row: dict[str, object] = {"id": record.id, "messages": _portable(record.messages, out), "source": record.source}
    if record.answer is not None:
        row["solution"] = record.answer
    if record.kind is not None:
        row["kind"] = record.kind
    if record.mode is not None:
        row["mode"] = mode_name(Branch(record.mode))
    return row


def _portable(value: object, out: Path) -> object:
    if isinstance(value, dict):
        if value.get("type") == "image" and "image" in value:
            return {"type": "image", "image": _image(value["image"], out)}
        return {key: _portable(item, out) for key, item in value.items()}
    return [_portable(item, out) for item in value] if isinstance(value, list) else value


def _image(source: object, out: Path) -> str:
    from PIL import Image

    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        source = buffer.getvalue()
    if isinstance(source, bytes):
        folder = out.parent / IMAGE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / hashlib.sha256(source).hexdigest()[:24]
        if not file.exists():
            unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            unfinished.write_bytes(source)
            unfinished.replace(file)
        return f"{IMAGE_FOLDER}/{file.name}"
    text = str(source)
    if text.startswith("data:") or "://" in text:
        return text
    return os.path.relpath(Path(text).resolve(), out.parent.resolve())
