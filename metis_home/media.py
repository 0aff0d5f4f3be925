"""Images and videos of a conversation: found, checked and opened.

Messages come from users and data files, so nothing in them is trusted. An image's size is read from its header before a
pixel is decoded, only PNG, JPEG, WEBP and GIF (first frame) are opened, and an address on the network is refused unless
the caller allows it. Every failure is a `ProcessorError` that names the image.
"""

import base64
import binascii
import io
import logging
import os
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple

from PIL import Image, ImageOps

from .errors import ProcessorError

logger = logging.getLogger(__name__)

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_IMAGE_PIXELS = 64_000_000  # ours: 192 MB decoded, above any phone camera's 50 MP
MAX_ASPECT_RATIO = 200  # Qwen2.5-VL's image processor refuses more

_IMAGE_KEYS = ("image", "url", "path", "base64")
_VIDEO_KEYS = ("video", "url", "path")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter where warnings are errors
# What Pillow raises on broken files; SyntaxError is its word for a broken PNG.
_BROKEN_FILE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

Message = dict[str, object]
ImageSource = str | os.PathLike[str] | bytes | Image.Image


class VisionInputs(NamedTuple):
    """Media in the order of their placeholders; None where a conversation has none, as the processor wants it."""

    images: list[Image.Image] | None
    videos: list[object] | None
    video_options: dict[str, object]
    """For the processor, beside `videos`: which frames they are, so that their times come out right."""


def load_image(source: ImageSource, *, allow_remote: bool = False) -> Image.Image:
    """Open one image as RGB, transparency over white, turned as its EXIF orientation says.

    Args:
        source: a path, a `data:` URL with base64, the bytes of a file, or a PIL image.
        allow_remote: also fetch http and https addresses, through transformers' loader.
    Raises:
        ProcessorError: no such file, another format, broken, empty, more than 64 megapixels, longer than 200 : 1, or
            an address that is not allowed.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "image")
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), f"image of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _load_address(os.fspath(source), allow_remote)
    raise ProcessorError(
        f"an image is a {type(source).__name__}. Expected a path, a data: URL, the bytes of a file, or a PIL image."
    )


def image_size(source: ImageSource, *, allow_remote: bool = False) -> tuple[int, int]:
    """Read (width, height), in pixels, as they stand in the file, without decoding a pixel.

    `load_image` turns a picture that lies on its side; this tells the size before that.

    Raises:
        ProcessorError: as `load_image`, but for pixels that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return _check_size(source, "image")
    if isinstance(source, bytes):
        return _check_size(_open_header(io.BytesIO(source), f"image of {len(source)} bytes"), "image")
    if isinstance(source, (str, os.PathLike)) and not os.fspath(source).startswith("data:") and not allow_remote:
        address = os.fspath(source)
        with _open_file(address) as file:
            return _check_size(_open_header(file, address), address)
    return load_image(source, allow_remote=allow_remote).size


def load_message_images(messages: list[Message], *, allow_remote: bool = False) -> list[Message]:
    """Return the conversation with every image opened: `{"type": "image", "image": PIL image}`.

    The caller's messages stay as they are. An image block without a source is a placeholder and stays too.
    """
    return [
        {**message, "content": [_with_open_image(block, allow_remote) for block in _blocks(message)]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def process_vision_info(
    messages: list[Message] | list[list[Message]], *, allow_remote: bool = False
) -> tuple[list[Image.Image] | None, list[object] | None]:
    """The images and videos of `collect_vision`, under the name and in the shape that Qwen's examples use."""
    found = collect_vision(messages, allow_remote=allow_remote)
    return found.images, found.videos


def collect_vision(messages: list[Message] | list[list[Message]], *, allow_remote: bool = False) -> VisionInputs:
    """Collect the images and videos of a conversation, or of a batch of conversations, in order.

    With `qwen_vl_utils` installed its `process_vision_info` does the work, after the checks above: it also honours
    `resized_height`, `min_pixels` and the like of single blocks and reads videos. Without it, images are returned as
    they are for the processor to resize, and videos are refused.

    Raises:
        ProcessorError: an image or video cannot be used, or a block has none.
    """
    conversations = messages if messages and isinstance(messages[0], list) else [messages]
    flat: list[Message] = [message for conversation in conversations for message in conversation]  # type: ignore[misc]
    opened = load_message_images(flat, allow_remote=allow_remote)
    images, num_videos = [], 0
    for block in (block for message in opened for block in _blocks(message)):
        if _is_video(block):
            source = next((block[key] for key in _VIDEO_KEYS if block.get(key) is not None), None)
            check_video_source(source, allow_remote=allow_remote)
            num_videos += 1
        elif _is_image(block):
            if "image" not in block:
                raise ProcessorError('an image block has no image. Expected {"type": "image", "image": "photo.png"}.')
            images.append(block["image"])
    if not images and not num_videos:
        return VisionInputs(None, None, {})
    helper = _qwen_vl_utils()
    if helper is None:
        if num_videos:
            raise ProcessorError(
                "a message holds a video, and videos are read by qwen-vl-utils and torchvision, which cannot be "
                "imported here. Install them with `pip install 'metis_home[vision]'`, or pass frames as images."
            )
        return VisionInputs(images, None, {})  # type: ignore[arg-type]
    if not num_videos:
        return VisionInputs(helper.process_vision_info(opened)[0], None, {})
    try:
        resized, videos, options = helper.process_vision_info(
            opened, return_video_kwargs=True, return_video_metadata=True
        )
    except Exception as error:  # its readers (torchvision, decord, torchcodec) fail in as many ways as there are
        raise ProcessorError(
            f"a video cannot be read by qwen_vl_utils ({type(error).__name__}: {error}). "
            "Is the file whole? Newer torchvision (0.28) reads no videos itself: `pip install torchcodec`, or decord."
        ) from error
    options["video_metadata"] = [metadata for _, metadata in videos]
    return VisionInputs(resized, [frames for frames, _ in videos], options)


def check_video_source(source: object, *, allow_remote: bool = False) -> None:
    """Refuse videos from the network or from `file:` addresses; frames, arrays and paths pass.

    Raises:
        ProcessorError: there is no source, or it is an address that is not allowed.
    """
    if source is None:
        raise ProcessorError('a video block has no video. Expected {"type": "video", "video": "film.mp4"}.')
    if isinstance(source, str) and "://" in source and not (allow_remote and _is_remote(source)):
        raise ProcessorError(_refusal("video", source))


def _blocks(message: Message) -> list[dict[str, object]]:
    content = message.get("content")
    if not isinstance(content, list):
        return []
    for block in content:
        if not isinstance(block, dict):
            raise ProcessorError(
                f"a message holds a {type(block).__name__} in its content list. Expected blocks such as "
                '{"type": "image", "image": "photo.png"} or {"type": "text", "text": "..."}.'
            )
    return content


def _is_image(block: dict[str, object]) -> bool:
    return block.get("type") in ("image", "image_url") or "image" in block or "image_url" in block


def _is_video(block: dict[str, object]) -> bool:
    return block.get("type") == "video" or "video" in block


def _with_open_image(block: dict[str, object], allow_remote: bool) -> dict[str, object]:
    if not _is_image(block):
        return block
    rest = {key: value for key, value in block.items() if key not in (*_IMAGE_KEYS, "image_url", "type")}
    source = next((block[key] for key in (*_IMAGE_KEYS, "image_url") if block.get(key) is not None), None)
    if isinstance(source, dict):  # OpenAI: {"image_url": {"url": ...}}
        source = source.get("url")
    if source is None:
        return {"type": "image", **rest}
    if block.get("base64") is source and isinstance(source, str):
        source = _decode_base64(source.partition(",")[2] if source.startswith("data:") else source)
    return {"type": "image", "image": load_image(source, allow_remote=allow_remote), **rest}  # type: ignore[arg-type]


def _load_address(address: str, allow_remote: bool) -> Image.Image:
    if address.startswith("data:"):
        header, _, data = address.partition(",")
        if not header.endswith(";base64"):
            raise ProcessorError(f"a data: image begins {header[:40]!r}. Expected 'data:image/png;base64,...'.")
        return load_image(_decode_base64(data))
    if _is_remote(address) and allow_remote:
        from transformers.image_utils import load_image as fetch

        try:
            fetched = fetch(address, timeout=30)
        except _BROKEN_FILE as error:
            raise ProcessorError(f"{_short(address)}: cannot be fetched: {error}") from error
        return _decode(fetched, _short(address))
    with _open_file(address) as file:
        return _open(file, address)


def _open_file(address: str) -> IO[bytes]:
    if "://" in address or address.startswith("file:"):
        raise ProcessorError(_refusal("image", address))
    path = Path(address).expanduser()
    if not path.is_file():  # also devices and pipes, which never end
        raise ProcessorError(f"{_short(address)}: no such image file.")
    return path.open("rb")


def _open(file: IO[bytes], name: str) -> Image.Image:
    return _decode(_open_header(file, name), name)


def _open_header(file: IO[bytes], name: str) -> Image.Image:
    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except _BOMB as error:
        raise ProcessorError(f"{name}: {error}") from error
    except _BROKEN_FILE as error:
        raise ProcessorError(f"{name}: not a readable {', '.join(IMAGE_FORMATS)} image ({error}).") from error


def _check_size(image: Image.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    if not width or not height:
        raise ProcessorError(f"{name}: is empty, {width} x {height} pixels.")
    if width * height > MAX_IMAGE_PIXELS:
        raise ProcessorError(
            f"{name}: has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS:,} are decoded. Scale it down first."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ProcessorError(f"{name}: is {width} x {height} pixels, longer than {MAX_ASPECT_RATIO} : 1. Crop it.")
    return width, height


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGB", layer.size, "white")
            image.paste(layer, mask=layer.getchannel("A"))
            return image
        return image.convert("RGB")
    except (*_BROKEN_FILE, *_BOMB) as error:
        raise ProcessorError(f"{name}: broken image: {error}") from error


def _decode_base64(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProcessorError(f"a base64 image cannot be decoded: {error}.") from error


def _is_remote(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def _refusal(kind: str, address: str) -> str:
    if _is_remote(address):
        return (
            f"{_short(address)}: {kind}s are not fetched from the network by default, because messages may name any "
            "host. Download it and pass the path, or set `processor.allow_remote_media = True`."
        )
    return f"{_short(address)}: addresses of this kind are not opened. Pass the path of the {kind} file."


def _short(address: str) -> str:
    return address if len(address) <= 200 else address[:197] + "..."


def _qwen_vl_utils() -> ModuleType | None:
    try:
        import qwen_vl_utils
    except ModuleNotFoundError:
        return None
    except (ImportError, RuntimeError) as error:  # it imports torchvision, which may not fit this torch
        logger.warning("qwen_vl_utils is installed but cannot be imported (%s); images are read without it", error)
        return None
    return qwen_vl_utils
