"""Pictures from tensors, and grids of them with their captions."""

from collections.abc import Sequence
from textwrap import wrap

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sampling.errors import RunFailed

CAPTION_WIDTH_PX, CAPTION_CHARACTERS, FONT_PX, TOP_PX, GAP_PX = 200, 30, 12, 20, 4
SMALLEST_CELL_PX = 128
SURROUND, TEXT = (128, 128, 128), (255, 255, 255)  # black and white pictures both stand out


def to_picture(image: Tensor) -> Image.Image:
    """Turns (3, H, W) in [0, 1] into an 8-bit picture, rounding to nearest."""
    if not torch.isfinite(image).all():
        raise RunFailed("the model painted non-finite pixels; sample with dtype=float32")
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def caption_grid(
    captions: Sequence[str], rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]
) -> Image.Image:
    """Lays pictures out with a caption left of each row and a title above each column.

    Small pictures are enlarged by a whole factor, pixel by pixel.
    """
    width, height = rows[0][0].size
    factor = max(1, SMALLEST_CELL_PX // max(width, height))
    width, height = width * factor, height * factor
    font = ImageFont.load_default(FONT_PX)
    size = (
        CAPTION_WIDTH_PX + len(titles) * (width + GAP_PX),
        TOP_PX + len(rows) * (height + GAP_PX),
    )
    grid = Image.new("RGB", size, SURROUND)
    pen = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        pen.text((CAPTION_WIDTH_PX + column * (width + GAP_PX), 3), title, TEXT, font)
    for row, (caption, pictures) in enumerate(zip(captions, rows, strict=True)):
        y = TOP_PX + row * (height + GAP_PX)
        lines = wrap(caption, CAPTION_CHARACTERS)[: height // (FONT_PX + 3)]
        pen.multiline_text((GAP_PX, y), "\n".join(lines), TEXT, font)
        for column, picture in enumerate(pictures):
            x = CAPTION_WIDTH_PX + column * (width + GAP_PX)
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
    return grid
