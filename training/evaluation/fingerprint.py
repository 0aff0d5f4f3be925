"""Short digests that tell whether a model or a row is still the one that was evaluated before."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from metis_home.errors import DataError
from metis_home.training.data.conversation import image_sources
from metis_home.training.judging import is_missing, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.training.data.records import Record

_SAMPLE = 4096  # numbers read per tensor: training moves them all, and 7B parameters are digested in seconds
_JUDGED_BY = ("options", "tolerance")  # columns that the verifier reads beside gold and kind


def model_fingerprint(model: "PreTrainedModel") -> str:
    """Digest names, shapes, types and evenly spaced values of all parameters and buffers."""
    import torch

    digest = xxhash.xxh128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        digest.update(flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def row_fingerprint(record: "Record") -> str:
    """Digest what a row asks and what is right: texts, the contents of its images, gold, kind, options, tolerance, mode,
    source.

    Raises:
        DataError: an image cannot be read.
    """
    gold = [record.answer, record.kind, None if record.mode is None else int(record.mode), record.source]
    columns = {name: plain(record.columns.get(name)) for name in _JUDGED_BY}
    judged_by = {name: value for name, value in columns.items() if not is_missing(value) and value != []}
    return _digest(record, [gold, judged_by] if judged_by else [gold])


def question_fingerprint(record: "Record") -> str:
    """Digest what a row asks: texts and the contents of its images.

    Raises:
        DataError: an image cannot be read.
    """
    return _digest(record, [])


def image_contents(record: "Record") -> list[bytes]:
    """`image_bytes` of every image of a row, in order.

    Raises:
        DataError: an image cannot be read; names the row.
    """
    found = []
    for source in image_sources(record.messages):
        try:
            found.append(image_bytes(source))
        except OSError as error:
            raise DataError(
                f"row {record.index} ({record.id}): the image {source} cannot be read: {error.strerror or error}. "
                "Mend or remove the row."
            ) from error
    return found


def image_bytes(source: object) -> bytes:
    """What identifies an image: the file's bytes, or its pixels where it is in memory."""
    from PIL import Image

    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        return f"{source.mode} {source.size}".encode() + source.tobytes()
    text = str(source)
    return text.encode() if text.startswith("data:") or "://" in text else Path(text).read_bytes()


def _digest(record: "Record", further: list[object]) -> str:
    asked = _without_images(record.messages)
    digest = xxhash.xxh128(json.dumps([asked, *further], sort_keys=True, default=str).encode())
    for image in image_contents(record):
        digest.update(xxhash.xxh128(image).digest())
    return digest.hexdigest()


def _without_images(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: "image" if key == "image" and value.get("type") == "image" else _without_images(item)
            for key, item in value.items()
        }
    return [_without_images(item) for item in value] if isinstance(value, (list, tuple)) else value
