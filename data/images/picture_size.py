"""What became of a picture's size on its way to a model: stored, resized, cropped.

SDXL is told these six numbers of every picture (Podell et al. 2023, section 2.2).
"""

import json
from typing import NamedTuple

READER_VERSION = 3
"""Of what training and encoding read of a picture: the versions of decode.py, and from 3 on the
size that it had before it was stored."""
MAX_JSON_BYTES = 1 << 20
MAX_SIDE = 1 << 31


class PictureSize(NamedTuple):
    """Six numbers in pixels, heights before widths, in the order of SDXL's `time_ids`."""

    original_height: int
    """Before any resize: as stored, or as the picture was before it was resized to be stored."""
    original_width: int
    crop_top: int
    """Of the crop's corner in the resized picture."""
    crop_left: int
    target_height: int
    """As the model is given it, after the crop."""
    target_width: int

    @classmethod
    def whole(cls, height: int, width: int) -> "PictureSize":
        """Returns the size of a picture that was neither resized nor cropped."""
        return cls(height, width, 0, 0, height, width)


def size_before_storing(metadata: bytes, width: int, height: int) -> tuple[int, int]:
    """Returns the width and height that a picture of width x height had before it was stored.

    `metadata` is its .json as img2dataset writes it, which resizes pictures: original_width,
    original_height. (0, 0) where it says nothing, or what is stored, before EXIF turned it.
    """
    try:
        values = json.loads(metadata) if len(metadata) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        return 0, 0
    names = ("original_width", "original_height")
    sides = [values.get(name) for name in names] if isinstance(values, dict) else []
    whole = [side for side in sides if type(side) is int and 0 < side < MAX_SIDE]
    if len(whole) < len(names) or whole in ([width, height], [height, width]):
        return 0, 0
    return whole[0], whole[1]
