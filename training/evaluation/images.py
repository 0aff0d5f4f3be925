"""Where a run's view finds the images of a row: the file itself, or a copy of what was only in memory."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from metis_home.media import load_image
from metis_home.training.data.conversation import image_sources

from .fingerprint import image_bytes

if TYPE_CHECKING:
    from metis_home.training.data.records import Record

FOLDER = "images"


def image_references(record: "Record", directory: Path) -> list[str]:
    """The absolute path of each image of a record; bytes, data URLs and PIL images are saved below `directory`.

    A saved image is named by its content, so each is saved once; its reference is relative to `directory`.

    Raises:
        ProcessorError: an image cannot be read.
    """
    return [_reference(source, directory) for source in image_sources(record.messages)]


def _reference(source: object, directory: Path) -> str:
    if isinstance(source, (str, os.PathLike)) and not str(source).startswith("data:"):
        return str(source) if "://" in str(source) else str(Path(source).absolute())
    name = f"{FOLDER}/{xxhash.xxh128(image_bytes(source)).hexdigest()}.png"
    path = directory / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        load_image(source).save(partial, format="PNG")  # type: ignore[arg-type]
        os.replace(partial, path)
    return name
