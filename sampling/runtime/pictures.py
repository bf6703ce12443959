"""Pictures from tensors, and grids of them with their captions."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.images.pictures import open_picture

CAPTION_WIDTH_PX, FONT_PX, LINE_PX, GAP_PX = 200, 12, 15, 4
LETTER_PX = 6.7
SMALLEST_CELL_PX = 128
SURROUND, TEXT = (128, 128, 128), (255, 255, 255)  # black and white pictures both stand out


def eight_bit(images: Tensor) -> Tensor:
    """Rounds values in [0, 1] to a picture file's uint8; RunFailed for what is not finite."""
    if not torch.isfinite(images).all():
        raise RunFailed("the model generated non-finite pixels; sample with dtype=float32")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_picture(image: Tensor) -> Image.Image:
    """Turns (3, H, W) in [0, 1] into an 8-bit picture, rounding to nearest."""
    return Image.fromarray(eight_bit(image).permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, picture: Image.Image) -> None:
    """Writes a picture as PNG; the file is whole or absent."""
    content = BytesIO()
    picture.save(content, "PNG")
    write_whole(path, content.getvalue())


def read_picture(file: Path) -> Tensor:
    """Reads a picture file as (3, H, W) float32 in [0, 1], decoded as training images are.

    The inverse of `to_picture`. Raises BadImage.
    """
    pixels = np.asarray(open_picture(file), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
    heads = [_lines(title, width) for title in titles]
    top = max(map(len, heads)) * LINE_PX + GAP_PX
    size = (CAPTION_WIDTH_PX + len(titles) * (width + GAP_PX), top + len(rows) * (height + GAP_PX))
    grid = Image.new("RGB", size, SURROUND)
    pen = ImageDraw.Draw(grid)
    for column, head in enumerate(heads):
        x = CAPTION_WIDTH_PX + column * (width + GAP_PX)
        pen.multiline_text((x, GAP_PX / 2), "\n".join(head), TEXT, font, spacing=LINE_PX - FONT_PX)
    for row, (caption, pictures) in enumerate(zip(captions, rows, strict=True)):
        y = top + row * (height + GAP_PX)
        lines = _lines(caption, CAPTION_WIDTH_PX)[: height // LINE_PX]
        pen.multiline_text((GAP_PX, y), "\n".join(lines), TEXT, font)
        for column, picture in enumerate(pictures):
            x = CAPTION_WIDTH_PX + column * (width + GAP_PX)
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
    return grid


def _lines(text: str, width_px: int) -> list[str]:
    return wrap(text, int(width_px / LETTER_PX)) or [""]
