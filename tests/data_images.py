"""Image folders for the data tests: small pictures that differ, and every kind of damage."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Returns an RGB image (width, height) that no other number gives."""
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """Returns the bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_folder(folder: Path, num_images: int, size: tuple[int, int] = (24, 16)) -> Path:
    """Writes num_images PNGs with sidecar captions, some in a subfolder."""
    for number in range(num_images):
        path = folder / ("" if number % 3 else "deep/er") / f"image_{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, size)))
        path.with_suffix(".txt").write_text(f"picture {number}\n")
    return folder


def png_of_size(width: int, height: int) -> bytes:
    """Returns a well-formed PNG header that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        check = zlib.crc32(kind + content)
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
    return b"\x89PNG\r\n\x1a\n" + chunks


def write_damaged(folder: Path) -> dict[str, str]:
    """Writes one file of each kind of damage; returns {name: a word of its reason}."""
    good = encoded(picture(10_000, (64, 64)), "JPEG")
    flipped = bytearray(encoded(picture(10_001)))
    flipped[60] ^= 0xFF
    files = {
        "truncated.jpg": (good[: len(good) // 2], "x", "truncated"),
        "truncated.png.png": (encoded(picture(1))[:200], "x", "truncated"),
        "flipped.png": (bytes(flipped), "x", "truncated or damaged"),
        "zero.jpg": (b"", "x", "zero bytes"),
        "text.jpg": (b"<html>not found</html>", "x", "not an image"),
        "bomb.png": (png_of_size(30_000, 30_000), "x", "bomb"),
        "float.tif": (encoded(Image.new("F", (8, 8)), "TIFF"), "x", "32-bit"),
        "silent.png": (encoded(picture(2)), None, "no caption"),
        "blank.png": (encoded(picture(3)), " \n", "empty caption"),
        "latin.png": (encoded(picture(4)), b"caf\xe9", "not UTF-8"),
        "orphan.txt": (None, "x", "no image"),
    }
    for name, (content, caption, _) in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
        if caption is not None:
            caption_bytes = caption if isinstance(caption, bytes) else caption.encode()
            (folder / name).with_suffix(".txt").write_bytes(caption_bytes)
    return {name: reason for name, (_, _, reason) in files.items()}
