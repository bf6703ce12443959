"""The rows of the black-point study: one CSV line per image, readable by anything.

Everything the study concludes is computed from these rows alone, so that committed rows can be
checked and summarised again. The rows of real images stand beside those of the checkpoints, under
the name `data`.
"""

import csv
import gzip
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole

DATA = "data"
"""Checkpoint name of the rows that describe real images."""
DECIMALS = 5
"""Luminances are rounded to this where they are measured, so that a file holds what was computed
with."""


@dataclass(frozen=True)
class Row:
    """One image of one cell: how it was made, and what was measured on it."""

    checkpoint: str
    cell: str
    index: int
    group: str
    """What its caption says of the background: open, black, white or other."""
    prompt: str
    seed: int
    guidance_scale: float
    guidance_rescale: float
    num_steps: int
    border_luminance: float
    image_luminance: float
    digit: int
    digit_read: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Identifies the row within a study."""
        return self.checkpoint, self.cell, self.index


COLUMNS = [field.name for field in fields(Row)]
TYPES: dict[str, Any] = {field.name: field.type for field in fields(Row)}


def to_csv(rows: Iterable[Row]) -> str:
    """Writes rows, sorted by their key, as CSV text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: row.key):
        writer.writerow(asdict(row))
    return text.getvalue()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a CSV file, gzipped where the name ends in .gz; the file is whole or absent."""
    content = to_csv(rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # equal rows make equal files
    write_whole(path, content)


def read_rows(path: Path) -> list[Row]:
    """Reads rows that `write_rows` wrote, plain or gzipped."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; `blackpoint evaluate` writes rows.csv.gz into its output"
        )
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != COLUMNS:
        raise UserError(f"{path} has columns {reader.fieldnames}; rows of the study have {COLUMNS}")
    return [Row(**{name: TYPES[name](row[name]) for name in COLUMNS}) for row in reader]
