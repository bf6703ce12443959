"""RGB image -> square uint8 array: resize the shorter side, crop, flip.

The shorter side becomes `resolution` pixels, with antialiasing and the aspect kept, and a square
is cropped from the longer one. Only the square is resized, so a picture of 10000 x 1 pixels costs
no more than any other. All draws of a sample are functions of (seed, epoch, index): the same
sample in the same epoch looks the same in any batch, on any process, after any resume.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image


class Draws(NamedTuple):
    """What is random about one sample in one epoch; each is uniform in [0, 1)."""

    crop_x: float
    crop_y: float
    flip: float
    caption_dropout: float


CENTER = Draws(crop_x=0.5, crop_y=0.5, flip=1.0, caption_dropout=1.0)
"""No draw: center crop, no flip, no dropout."""


def draw(seed: int, epoch: int, index: int) -> Draws:
    """Draws for sample `index` in pass `epoch`; all four, whether they are used or not."""
    return Draws(*np.random.default_rng([seed, epoch, index]).random(4).tolist())


def crop_box(
    width: int, height: int, resolution: int, crop_x: float, crop_y: float
) -> tuple[float, float, float, float]:
    """Returns the square (left, top, right, bottom), in pixels of the image as it is stored."""
    shorter = min(width, height)
    resized_width = max(resolution, round(width * resolution / shorter))
    resized_height = max(resolution, round(height * resolution / shorter))
    # Whole pixels after the resize; u = .5 is the center and every offset is equally likely.
    left = int(crop_x * (resized_width - resolution + 1))
    top = int(crop_y * (resized_height - resolution + 1))
    scale_x, scale_y = width / resized_width, height / resized_height
    return (
        left * scale_x,
        top * scale_y,
        min((left + resolution) * scale_x, width),
        min((top + resolution) * scale_y, height),
    )


def transform(
    image: Image.Image, resolution: int, crop_x: float, crop_y: float, flip: bool
) -> np.ndarray:
    """Returns uint8 (resolution, resolution, 3)."""
    if image.size != (resolution, resolution):
        box = crop_box(*image.size, resolution, crop_x, crop_y)
        if min(image.size) == resolution:
            image = image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]
        else:
            image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels
