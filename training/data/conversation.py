"""One row's question as a conversation: every image in its place, as a block that names its source.

{"prompt": "How many?", "images": ["a.png"]}
    -> [{"role": "user", "content": [{"type": "image", "image": "data/a.png"}, {"type": "text", "text": "How many?"}]}]
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from metis_home.media import Message

from .problems import RowError

ROLES = ("system", "user", "assistant", "tool")
PLACEHOLDER = "<image>"
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
_BLOCK_KEYS = {"text": {"type", "text"}, "image": {"type", *_IMAGE_KEYS}}


def conversation(row: Mapping[str, object], folder: Path | None) -> tuple[list[Message], str | None]:
    """Build the messages of a row, and take off the assistant's last message.

    Images of the `image` or `images` column go, in order, to the image blocks without a source of their own and to each
    `<image>` of a text; where there is neither, before the last user message. A text in a block is taken literally.

    Args:
        row: a row; missing values may be None. Its keys `prompt`, `messages`, `image`, `images` are read.
        folder: where relative paths begin.
    Returns:
        The messages up to the turn that is to be answered, and the answer's text if the row's messages hold it.
    Raises:
        RowError: what is wrong with the row.
    """
    messages = _raw_messages(row, folder)
    response = None
    if messages and messages[-1]["role"] == "assistant":
        response = _text_of(messages.pop())
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        found = messages[-1]["role"] if messages else "nothing"
        raise RowError("empty prompt", f"expected a user message to answer, found {found}")
    images = [_located(source, folder) for source in _column_images(row)]
    _place(messages, images)
    if messages[-1]["role"] == "user" and not _text_of(messages[-1]).strip():
        raise RowError("empty prompt", "the last user message has no text")
    return messages, response


def image_sources(messages: Sequence[Message]) -> Iterator[object]:
    """Every image of a conversation that `conversation` built, in order."""
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            yield from (block["image"] for block in content if block["type"] == "image")


def texts(messages: Sequence[Message]) -> Iterator[str]:
    """Every text of a conversation that `conversation` built, in order."""
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (block["text"] for block in content if block["type"] == "text")


def _raw_messages(row: Mapping[str, object], folder: Path | None) -> list[Message]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, list) and messages is None:  # TRL's conversational prompts
        prompt, messages = None, prompt
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise RowError("no prompt", f"expected prompt or messages, one of the two; found {found}")
    if messages is None:
        if not isinstance(prompt, str):
            raise RowError("wrong type", f"prompt must be a text, found a {type(prompt).__name__}")
        return [{"role": "user", "content": prompt}]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError("wrong type", f"messages must be a list of messages, found {_what(messages)}")
    return [_checked_message(message, folder) for message in messages]


def _checked_message(message: object, folder: Path | None) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, Mapping) else _what(message)
        raise RowError("wrong message", f"expected a message whose role is {', '.join(ROLES)}; found {found!r}")
    # Parquet fills in the keys that other messages have.
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content", "")
    if isinstance(content, str):
        return {**kept, "content": content}
    if not isinstance(content, Sequence):
        raise RowError("wrong message", f"content must be a text or a list of blocks, found a {type(content).__name__}")
    return {**kept, "content": [_checked_block(block, folder) for block in content]}


def _checked_block(block: object, folder: Path | None) -> dict[str, object]:
    if isinstance(block, str):
        return {"type": "text", "text": block}
    if not isinstance(block, Mapping):
        raise RowError("wrong message", f"a block must be a mapping or a text, found a {type(block).__name__}")
    kept = {key: value for key, value in block.items() if value is not None}
    if kept.get("type") == "video" or "video" in kept:
        raise RowError("video", "videos cannot be trained on; pass frames as images")
    is_image = kept.get("type") in ("image", "image_url") or any(key in kept for key in ("image", "image_url"))
    kind = "image" if is_image else "text"
    unknown = kept.keys() - _BLOCK_KEYS[kind]
    if unknown or (kind == "text" and not isinstance(kept.get("text"), str)):
        raise RowError(
            "wrong message",
            'expected {"type": "text", "text": "..."} or {"type": "image", "image": "a.png"}; '
            f"found a block with the keys {', '.join(sorted(map(str, kept)))}",
        )
    return _image_block(kept, folder) if is_image else {"type": "text", "text": kept["text"]}


def _column_images(row: Mapping[str, object]) -> list[object]:
    one, several = row.get("image"), row.get("images")
    if one is not None and several is not None:
        raise RowError("wrong type", "image and images are both given; expected one of the two")
    images = several if one is None else one
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _place(messages: list[Message], images: list[object]) -> None:
    """Replace the messages by messages with all images in their places.

    Raises:
        RowError: there are more images than places, or fewer.
    """
    messages[:] = [_with_blocks(message) for message in messages]
    places = sum("image" not in block for message in messages for block in _image_blocks(message))
    if not places and images:
        last = messages[-1]
        messages[-1] = {**last, "content": [{"type": "image"} for _ in images] + _blocks(last)}
        places = len(images)
    if places != len(images):
        raise RowError("images and placeholders differ", f"{places} placeholders for {len(images)} images")
    waiting = iter(images)
    for position, message in enumerate(messages):
        if isinstance(message["content"], list):
            filled = [
                {"type": "image", "image": next(waiting)} if block == {"type": "image"} else block
                for block in message["content"]
            ]
            messages[position] = {**message, "content": filled}


def _image_blocks(message: Message) -> list[dict[str, object]]:
    content = message["content"]
    return [block for block in content if block["type"] == "image"] if isinstance(content, list) else []


def _blocks(message: Message) -> list[dict[str, object]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _with_blocks(message: Message) -> Message:
    """The message with each `<image>` of its text turned into an image block. Texts in blocks are taken literally."""
    content = message["content"]
    if not isinstance(content, str) or PLACEHOLDER not in content:
        return message
    found: list[dict[str, object]] = []
    for number, text in enumerate(content.split(PLACEHOLDER)):
        if number:
            found.append({"type": "image"})
        if text:
            found.append({"type": "text", "text": text})
    return {**message, "content": found}


def _image_block(block: Mapping[str, object], folder: Path | None) -> dict[str, object]:
    """`{"type": "image", "image": source}`; without "image" where the block is a place for an image of the column."""
    key = next((key for key in _IMAGE_KEYS if key in block), None)
    if key is None:
        return {"type": "image"}
    source = block[key]
    if key == "image_url" and isinstance(source, Mapping):  # OpenAI: {"image_url": {"url": ...}}
        source = source.get("url")
    if key == "base64" and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:image/png;base64,{source}"
    return {"type": "image", "image": _located(source, folder)}


def _located(source: object, folder: Path | None) -> object:
    """The source as `media.load_image` takes it, a relative path made relative to `folder`."""
    if isinstance(source, Mapping):  # {"bytes": ..., "path": ...}, as datasets stores images
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, (bytes, Image.Image)):
        return source
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise RowError(
            "wrong type", f"an image must be a path, a data: URL, bytes or a PIL image; found {_what(source)}"
        )
    text = os.fspath(source)
    if text.startswith("data:") or "://" in text:  # the latter are refused where images are opened
        return text
    path = Path(text).expanduser()
    return str(path if folder is None else folder / path)


def _text_of(message: Message) -> str:
    return "".join(texts([message]))


def _what(value: object) -> str:
    return "nothing" if not value and value != 0 else f"a {type(value).__name__}"
