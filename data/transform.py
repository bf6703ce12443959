"""RGB image -> uint8 array of one size: resize to cover it, crop, flip.

The image is scaled, with antialiasing and the aspect kept, until it covers the wanted width and
height, those of the square or of a bucket, and what stands out on one side is cropped. Only what
is kept is resized, so a picture of 10000 x 1 pixels costs no more than any other. All draws of a
sample are functions of (seed, epoch, index): the same sample in the same epoch looks the same in
any batch, on any process, after any resume.
"""

from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from PIL import Image

from blackpoint.data.images.picture_size import PictureSize
from blackpoint.data.order.buckets import Size


class Draws(NamedTuple):
    """Random draws of one sample in one epoch; each is uniform in [0, 1)."""

    crop_x: float
    crop_y: float
    flip: float
    caption_dropout: float


CENTER = Draws(crop_x=0.5, crop_y=0.5, flip=1.0, caption_dropout=1.0)
"""No draw: center crop, no flip, no dropout."""


def draw(seed: int, epoch: int, index: int) -> Draws:
    """Draws for sample `index` in pass `epoch`; all four, whether they are used or not."""
    return Draws(*np.random.default_rng([seed, epoch, index]).random(4).tolist())


def caption_number(seed: int, epoch: int, index: int, count: int) -> int:
    """Draws which of `count` captions sample `index` has in pass `epoch`, 0 of one.

    It is a stream of its own: what else a sample draws does not depend on how many captions it has.
    """
    name = f"caption/{seed}/{epoch}/{index}"
    number = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    return number % count


def resized(width: int, height: int, size: Size) -> Size:
    """Returns the whole image's size once it is scaled to just cover `size`."""
    if size[0] * height >= size[1] * width:
        return size[0], max(size[1], round(height * size[0] / width))
    return max(size[0], round(width * size[1] / height)), size[1]


def crop_corner(
    width: int, height: int, size: Size, crop_x: float, crop_y: float
) -> tuple[int, int]:
    """Returns the left and top edge of the crop, in whole pixels of the resized image."""
    resized_width, resized_height = resized(width, height, size)
    # u = .5 is the center and every offset is equally likely.
    left = int(crop_x * (resized_width - size[0] + 1))
    return left, int(crop_y * (resized_height - size[1] + 1))


def picture_size(
    width: int, height: int, size: Size, crop_x: float, crop_y: float, flip: bool
) -> PictureSize:
    """Returns the size of what `transform` makes of an image of width x height.

    The crop's corner is that of the flipped picture where it is flipped.
    """
    left, top = crop_corner(width, height, size, crop_x, crop_y)
    if flip:
        left = resized(width, height, size)[0] - size[0] - left
    return PictureSize(height, width, top, left, size[1], size[0])


def crop_box(
    width: int, height: int, size: Size, crop_x: float, crop_y: float
) -> tuple[float, float, float, float]:
    """Returns the crop (left, top, right, bottom), in pixels of the image as it is stored."""
    resized_width, resized_height = resized(width, height, size)
    left, top = crop_corner(width, height, size, crop_x, crop_y)
    scale_x, scale_y = width / resized_width, height / resized_height
    return (
        left * scale_x,
        top * scale_y,
        min((left + size[0]) * scale_x, width),
        min((top + size[1]) * scale_y, height),
    )


def transform(
    image: Image.Image, size: Size, crop_x: float, crop_y: float, flip: bool
) -> np.ndarray:
    """Returns uint8 (height, width, 3) for size (width, height)."""
    if image.size != size:
        box = crop_box(*image.size, size, crop_x, crop_y)
        if image.size == resized(*image.size, size):
            image = image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]
        else:
            image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels
