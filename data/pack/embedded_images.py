"""Images inside Parquet files, as Hugging Face's datasets hold them: rows of {bytes, path}.

A column of plain binary is read alike. Rows are read in order, a few at a time, whatever the row
groups; nothing but those few images and one page is held in memory. How large a page is was for the
file's writer to choose: pyarrow puts up to 1,024 rows into one.
"""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import BadImage

ROWS_AT_ONCE = 8
BUFFER_BYTES = 1 << 20


def embedded_column(table: Path, column: str) -> str | None:
    """Returns the path of the images' bytes in a Parquet file; None if `column` holds none."""
    import pyarrow
    from pyarrow import parquet, types

    try:
        schema = parquet.read_schema(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table}: cannot be read as Parquet: {error}") from None
    if column not in schema.names:
        return None
    kind, path = schema.field(column).type, column
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, path = kind.field("bytes").type, f"{column}.bytes"
    return path if types.is_binary(kind) or types.is_large_binary(kind) else None


def image_sizes(table: Path, column: str) -> Iterator[int]:
    """Yields, row by row, the mean size in bytes of the images of the row group."""
    path = embedded_column(table, column)
    with _opened(table) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            sizes = [
                chunk.total_uncompressed_size
                for chunk in map(group.column, range(group.num_columns))
                if chunk.path_in_schema == path
            ]
            for _ in range(group.num_rows):
                yield sum(sizes) // group.num_rows


def num_rows(table: Path) -> int:
    """Returns the number of rows of a Parquet file."""
    with _opened(table) as file:
        return file.metadata.num_rows


class EmbeddedImages:
    """Reads images by file and row; rows that rise cost one pass. A context manager."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._path: Path | None = None
        self._file: Any = None
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._first = 0
        """The row that the batch begins with."""

    def __enter__(self) -> "EmbeddedImages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._path, self._file, self._batch, self._batches = None, None, None, iter(())

    def read(self, path: Path, row: int) -> bytes:
        """Returns the bytes of the image in a row, from 0; raises BadImage."""
        from pyarrow import ArrowException

        try:
            if path != self._path or row < self._first:
                self._open(path, row)
            while self._batch is None or row >= self._first + len(self._batch):
                self._first += 0 if self._batch is None else len(self._batch)
                self._batch = next(self._batches)
            values = self._batch.column(0)
            found = values[row - self._first].as_py()
        except (ArrowException, OSError, StopIteration, UserError) as error:
            self.__exit__(None, None, None)
            raise BadImage(f"damaged Parquet: {error or 'it ends before'}") from None
        content = found.get("bytes") if isinstance(found, dict) else found
        if content is None:
            raise BadImage(f"no image: {self.column} has no bytes")
        return content

    def _open(self, path: Path, row: int) -> None:
        self.__exit__(None, None, None)
        column = embedded_column(path, self.column)
        if column is None:
            raise BadImage(f"no image: {self.column} is no column of images")
        self._file, self._path = _opened(path), path
        metadata = self._file.metadata
        starts = [0]
        for number in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(number).num_rows)
        group = bisect_right(starts, row) - 1
        self._first = starts[min(group, len(starts) - 1)]
        groups = list(range(group, metadata.num_row_groups))
        self._batches = self._file.iter_batches(ROWS_AT_ONCE, groups, [column])


def _opened(table: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(table, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table}: cannot be read as Parquet: {error}") from None
