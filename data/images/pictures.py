"""Files of a user, outside shards: the pictures of a folder, and reading what a file may be."""

import os
import stat
from pathlib import Path

from PIL import Image

from blackpoint.data.files.walk import visible_files
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage, decode, known_formats

MAX_IMAGE_BYTES = 1 << 31
MAX_CAPTION_BYTES = 1 << 24


def picture_files(folder: Path) -> list[Path]:
    """Lists the pictures below a folder, sorted, without hidden ones; raises OSError."""
    return sorted(
        folder / directory / name
        for directory, names in visible_files(folder)
        for name in names
        if Path(name).suffix[1:].lower() in IMAGE_SUFFIXES
    )


def open_picture(path: Path) -> Image.Image:
    """Returns a picture file as training decodes it, RGB and upright; raises BadImage."""
    return decode(read_source_file(path, MAX_IMAGE_BYTES), max_image_pixels=None)


def picture_size(path: Path) -> tuple[int, int]:
    """Returns width and height as they are stored, from the file's header; raises BadImage."""
    try:
        if not path.is_file():  # a pipe may never give a byte
            raise BadImage("not a regular file")
        with Image.open(path, formats=known_formats()) as image:
            return image.size
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise BadImage(f"not an image that Pillow can read: {error}") from None


def read_source_file(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file; raises BadImage with the reason if there are none.

    A pipe, which may never give a byte, or a device, which may never end, is not opened.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size > max_bytes:
            raise BadImage(f"{status.st_size} bytes, above {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror}") from None
