"""What became of a picture's size on its way to a model: stored, resized, cropped.

SDXL is told these six numbers of every picture (Podell et al. 2023, section 2.2).
"""

from typing import NamedTuple


class PictureSize(NamedTuple):
    """Six numbers in pixels, heights before widths, in the order of SDXL's `time_ids`."""

    original_height: int
    """As stored, before any resize."""
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
