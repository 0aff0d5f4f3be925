"""Images of a few KB that claim 900 and 25 megapixels, one that is cut, one that is no image, and a good one."""

import struct
import zlib

from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(name, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    with open(name, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))))


bomb("bomb.png", 30000)
bomb("large.png", 5000)
Image.new("RGB", (64, 64), "red").save("good.png")
with open("good.png", "rb") as good, open("cut.png", "wb") as cut:
    cut.write(good.read()[:40])
with open("text.png", "w") as file:
    file.write("no image")
