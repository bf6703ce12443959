"""Images inside Parquet files, as Hugging Face's datasets hold them: rows of {bytes, path}.

A column of plain binary is read alike. Rows are read in order, a few at a time, whatever the row
groups; nothing but those few images and one page is held in memory. How large a page is was for the
file's writer to choose: pyarrow puts up to 1,024 rows into one.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import BadImage

ROWS_AT_ONCE = 8
BUFFER_BYTES = 1 << 20


def embedded_column(table: Path, column: str) -> str | None:
    """Returns the path of the images' bytes in a Parquet file; None if `column` holds none."""
    from pyarrow import types

    with opened(table) as file:
        schema = file.schema_arrow
    if column not in schema.names:
        return None
    kind, path = schema.field(column).type, column
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, path = kind.field("bytes").type, f"{column}.bytes"
    return path if types.is_binary(kind) or types.is_large_binary(kind) else None


def image_sizes(table: Path, column: str) -> Iterator[int]:
    """Yields, row by row, the mean size in bytes of the images of the row group."""
    path = embedded_column(table, column)
    with opened(table) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            sizes = [
                chunk.total_uncompressed_size
                for chunk in map(group.column, range(group.num_columns))
                if chunk.path_in_schema == path
            ]
            for _ in range(group.num_rows):
                yield sum(sizes) // group.num_rows


class EmbeddedImages:
    """Reads images by file and row; rows that rise cost one pass. A context manager."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._file = ExitStack()
        self._path: Path | None = None
        self._rows: Iterator[tuple[int, Any]] = iter(())
        self._next_row = 0

    def __enter__(self) -> "EmbeddedImages":
        return self

    def __exit__(self, *error: object) -> None:
        self._path, self._rows = None, iter(())
        self._file.close()

    def read(self, path: Path, row: int) -> bytes:
        """Returns the bytes of the image in a row, from 0; raises BadImage."""
        from pyarrow import ArrowException

        try:
            if path != self._path or row < self._next_row:
                self._open(path, row)
            value = next(value for number, value in self._rows if number == row).as_py()
        except (ArrowException, OSError, StopIteration, ValueError) as error:
            self.__exit__()
            raise BadImage(f"damaged Parquet: {str(error) or 'it ends before'}") from None
        self._next_row = row + 1
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise BadImage(f"no image: {self.column} has no bytes")
        return content

    def _open(self, path: Path, row: int) -> None:
        """Goes to the beginning of the row group that holds a row."""
        self.__exit__()
        column = embedded_column(path, self.column)
        if column is None:
            raise BadImage(f"no image: {self.column} is no column of images")
        file = self._file.enter_context(opened(path))
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        starts = list(itertools.accumulate(sizes, initial=0))
        group = min(bisect_right(starts, row) - 1, len(sizes))
        batches = file.iter_batches(ROWS_AT_ONCE, list(range(group, len(sizes))), [column])
        values = (value for batch in batches for value in batch.column(0))
        self._path, self._rows = path, zip(itertools.count(starts[group]), values, strict=False)


def opened(table: Path) -> Any:
    """Opens a Parquet file, whose pages are read one by one; raises UserError."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(table, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table}: cannot be read as Parquet: {error}") from None
