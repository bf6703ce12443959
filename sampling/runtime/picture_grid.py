"""Grids of pictures with their captions, and what was in them; free of torch, as reports are."""

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CAPTION_WIDTH_PX, FONT_PX, LINE_PX, GAP_PX = 200, 12, 15, 4
LETTER_PX = 6.7
SMALLEST_CELL_PX = 128
SURROUND, TEXT = (128, 128, 128), (255, 255, 255)  # black and white pictures both stand out


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
        lines, most = _lines(caption, CAPTION_WIDTH_PX), max(1, height // LINE_PX)
        if len(lines) > most:
            lines = [*lines[: most - 1], f"{lines[most - 1][:-3]}..."]
        pen.multiline_text((GAP_PX, y), "\n".join(lines), TEXT, font)
        for column, picture in enumerate(pictures):
            x = CAPTION_WIDTH_PX + column * (width + GAP_PX)
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
    return grid


def pictures_of_grid(
    grid: Image.Image, num_rows: int, num_columns: int
) -> list[list[Image.Image]] | None:
    """Cuts a grid of `caption_grid` into its pictures, row by row; None where it is no grid of so
    many squares."""
    side, rest = divmod(grid.width - CAPTION_WIDTH_PX, num_columns)
    top = grid.height - num_rows * side
    if rest or side <= GAP_PX or top < LINE_PX or (top - GAP_PX) % LINE_PX:
        return None
    lefts = [CAPTION_WIDTH_PX + column * side for column in range(num_columns)]
    boxes = [[(x, top + row * side) for x in lefts] for row in range(num_rows)]
    inner = side - GAP_PX
    return [[grid.crop((x, y, x + inner, y + inner)) for x, y in row] for row in boxes]


def _lines(text: str, width_px: int) -> list[str]:
    return wrap(text, int(width_px / LETTER_PX)) or [""]
