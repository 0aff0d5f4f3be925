"""Short digests that tell whether a model or a row is still the one that was evaluated before."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metis_home.training.data.records import Record

_SAMPLE = 4096  # numbers read per tensor: training moves them all, and 7B parameters are digested in seconds


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
    """Digest what a row asks and what is right: texts, the contents of its images, gold, kind, mode, source."""
    digest = xxhash.xxh128()
    images: list[bytes] = []

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: plain_image(item) if key == "image" and value.get("type") == "image" else plain(item)
                for key, item in value.items()
            }
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    def plain_image(source: object) -> str:
        images.append(image_bytes(source))
        return "image"

    asked = plain(record.messages)
    gold = [record.answer, record.kind, None if record.mode is None else int(record.mode), record.source]
    digest.update(json.dumps([asked, gold], sort_keys=True, default=str).encode())
    for image in images:
        digest.update(xxhash.xxh128(image).digest())
    return digest.hexdigest()


def image_bytes(source: object) -> bytes:
    """What identifies an image: the file's bytes, or its pixels where it is in memory."""
    from PIL import Image

    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        return f"{source.mode} {source.size}".encode() + source.tobytes()
    text = str(source)
    return text.encode() if text.startswith("data:") or "://" in text else Path(text).read_bytes()
