"""Picture files of a user, outside shards: those of a folder, and one of them read."""

from pathlib import Path

from PIL import Image

from blackpoint.data.files.walk import visible_files
from blackpoint.data.images.decode import IMAGE_SUFFIXES, decode
from blackpoint.data.images.source_file import MAX_IMAGE_BYTES, read_source_file


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
