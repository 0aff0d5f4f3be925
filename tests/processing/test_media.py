"""Images of messages are opened safely: what is refused, what is read, and how."""

import base64
import contextlib
import io
import logging
import struct
import sys
import types
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metis_home.errors import ProcessorError
from metis_home.media import MAX_IMAGE_PIXELS, collect_vision, load_image, load_message_images, process_vision_info

RED = Image.new("RGB", (8, 6), "red")


def encoded(image: Image.Image = RED, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + size
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def png_with_a_broken_chunk() -> bytes:
    """A PNG whose pixels end in a chunk without a proper name, for which Pillow raises SyntaxError."""
    whole = encoded(Image.effect_noise((64, 64), 90))
    pixels = whole.index(b"IDAT") + 4
    length = struct.unpack(">I", whole[pixels - 8 : pixels - 4])[0]
    half = whole[pixels : pixels + length // 2]
    start = whole[: pixels - 8] + struct.pack(">I", len(half)) + b"IDAT" + half
    return start + struct.pack(">I", zlib.crc32(b"IDAT" + half)) + struct.pack(">I", 4) + b"\x00\x01\x02\x03" + bytes(8)


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("form", ["path", "string", "bytes", "data", "image"])
def test_every_format_is_read_from_every_source(tmp_path, kind: str, form: str) -> None:
    data = encoded(RED, kind)
    path = tmp_path / "image.bin"  # the content decides, not the name
    path.write_bytes(data)
    source = {
        "path": path,
        "string": str(path),
        "bytes": data,
        "data": "data:image/x;base64," + base64.b64encode(data).decode(),
        "image": Image.open(path),
    }[form]

    image = load_image(source)

    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert all(abs(found - wanted) < 8 for found, wanted in zip(image.getpixel((4, 3)), (255, 0, 0), strict=True))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]

    image = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))

    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))

    assert load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(clear.convert("LA"))).getpixel((0, 0)) == (255, 255, 255)


def test_the_orientation_of_a_camera_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    once = load_image(encoded(RED, "JPEG", exif=exif))

    assert once.size == (6, 8)
    assert load_image(once).size == (6, 8)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://localhost/a.png", "not fetched from the network by default"),
        ("HTTPS://example.org/a.png", "not fetched from the network by default"),
        ("file:///etc/hostname", "Pass the path of the image file"),
        ("file:/etc/hostname", "Pass the path of the image file"),
        ("ftp://example.org/a.png", "Pass the path of the image file"),
        ("/dev/zero", "no such image file"),
        ("missing.png", "no such image file"),
        ("", "no such image file"),
        ("data:image/png,raw", "Expected 'data:image/png;base64"),
        ("data:image/png;base64,?!", "cannot be decoded"),
        ("data:image/png;base64,", "not a readable"),
    ],
)
def test_an_address_that_must_not_be_opened_is_refused(address: str, reason: str) -> None:
    with pytest.raises(ProcessorError, match=reason):
        load_image(address)


def test_the_size_is_refused_before_a_pixel_is_decoded(monkeypatch) -> None:
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size))

    with pytest.raises(ProcessorError, match=r"8001 x 8000 pixels; at most 64,000,000"):
        load_image(png_header(8001, 8000))

    assert decoded == []
    assert MAX_IMAGE_PIXELS == 8000 * 8000


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ProcessorError):
        load_image(png_header(*size))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_about_bombs_that_is_an_error_is_refused_as_well() -> None:
    with pytest.raises(ProcessorError):
        load_image(png_header(12_000, 10_000))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (1, 201)), "longer than 200 : 1"),
        (Image.new("RGB", (0, 5)), "is empty"),
        (b"", "not a readable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable"),
        (encoded(RED, "BMP"), "not a readable PNG, JPEG, WEBP, GIF"),
        (encoded(RED, "TIFF"), "not a readable PNG, JPEG, WEBP, GIF"),
        (encoded()[:45], "broken image|not a readable"),
        (png_with_a_broken_chunk(), "broken PNG file"),
        (12, "an image is a int"),
    ],
)
def test_an_unusable_image_is_refused(image: object, reason: str) -> None:
    with pytest.raises(ProcessorError, match=reason):
        load_image(image)


NOISE = Image.effect_noise((16, 16), 90).convert("RGB")
FILES = [encoded(NOISE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_a_damaged_file_is_an_image_or_an_error_of_ours(file: bytes, data: st.DataObject) -> None:
    damaged = bytearray(file[: data.draw(st.integers(0, len(file)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProcessorError):
        assert load_image(bytes(damaged)).mode == "RGB"


# ---- messages -------------------------------------------------------------------------------------------------------


def blocks_of(path: Path) -> list[dict]:
    data = base64.b64encode(path.read_bytes()).decode()
    return [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": RED},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": "data:image/png;base64," + data},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}},
        {"image": str(path)},
    ]


def test_every_spelling_of_an_image_block_is_opened(tmp_path) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    messages = [{"role": "user", "content": [*blocks_of(path), {"type": "text", "text": "?"}]}]

    content = load_message_images(messages)[0]["content"]

    assert [block["type"] for block in content] == ["image"] * 7 + ["text"]
    assert all(block["image"].getpixel((0, 0)) == (255, 0, 0) for block in content[:7])
    assert len(process_vision_info(messages)[0]) == 7
    assert len(process_vision_info([messages, messages])[0]) == 14


def test_text_placeholders_and_other_keys_are_kept() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image", "image": RED, "min_pixels": 784}]},
    ]

    opened = load_message_images(messages)

    assert opened[0] == messages[0]
    assert opened[1]["content"][0] == {"type": "image"}
    assert opened[1]["content"][1]["min_pixels"] == 784


def test_a_conversation_without_media_has_none() -> None:
    assert process_vision_info([{"role": "user", "content": "hi"}]) == (None, None)


def test_a_content_list_of_plain_strings_is_refused() -> None:
    with pytest.raises(ProcessorError, match="a message holds a str in its content list"):
        process_vision_info([{"role": "user", "content": ["hi"]}])


def test_a_video_without_a_reader_is_refused(without_qwen_vl_utils) -> None:
    with pytest.raises(ProcessorError, match=r"metis_home\[vision\]"):
        process_vision_info([{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}])


@pytest.mark.parametrize("address", ["http://localhost/film.mp4", "file:///film.mp4"])
def test_a_video_from_elsewhere_is_refused(address: str) -> None:
    with pytest.raises(ProcessorError, match=r"film\.mp4"):
        process_vision_info([{"role": "user", "content": [{"type": "video", "video": address}]}])


# ---- qwen_vl_utils --------------------------------------------------------------------------------------------------


@pytest.fixture
def without_qwen_vl_utils(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)


class StandIn(types.ModuleType):
    """What we use of qwen_vl_utils, which needs a torchvision that no CPU machine of ours has."""

    def __init__(self) -> None:
        super().__init__("qwen_vl_utils")
        self.received: list[dict] = []

    def process_vision_info(self, messages, return_video_kwargs=False, return_video_metadata=False):
        self.received.extend(messages)
        blocks = [block for message in messages for block in message["content"]]
        if any(block.get("video") == "broken.mp4" for block in blocks):
            raise OSError("moov atom not found")
        videos = [("frames", {"fps": 2}) for block in blocks if "video" in block] or None
        answer = (["its images"], videos)
        return (*answer, {"do_sample_frames": False}) if return_video_kwargs else answer


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", module)
    return module


def test_qwen_vl_utils_does_the_work_where_it_is_installed_and_gets_opened_images(stand_in, tmp_path) -> None:
    RED.save(tmp_path / "red.png")

    found = process_vision_info([{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "red.png")}]}])

    assert found == (["its images"], None)
    assert stand_in.received[0]["content"][0]["image"].size == (8, 6)  # checked and opened by us: it sees no address


def test_a_video_comes_with_the_times_of_its_frames(stand_in) -> None:
    found = collect_vision([{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}])

    assert found.videos == ["frames"]
    assert found.video_options == {"do_sample_frames": False, "video_metadata": [{"fps": 2}]}


def test_a_video_that_cannot_be_read_is_refused(stand_in) -> None:
    with pytest.raises(ProcessorError, match="moov atom not found"):
        collect_vision([{"role": "user", "content": [{"type": "video", "video": "broken.mp4"}]}])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_block_without_its_medium_is_refused(kind: str) -> None:
    with pytest.raises(ProcessorError, match=f"block has no {kind}"):
        collect_vision([{"role": "user", "content": [{"type": kind}]}])


def test_a_broken_qwen_vl_utils_is_reported_and_images_still_work(monkeypatch, tmp_path, caplog) -> None:
    (tmp_path / "qwen_vl_utils.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "qwen_vl_utils", raising=False)

    with caplog.at_level(logging.WARNING):
        images, videos = process_vision_info([{"role": "user", "content": [{"type": "image", "image": RED}]}])

    assert [image.size for image in images] == [(8, 6)]
    assert videos is None
    assert "torchvision::nms" in caplog.text
