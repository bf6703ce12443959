"""Tables of captions, metadata.jsonl, .csv or .parquet: their rows one by one, and their columns.

A .jsonl line that is no object is one bad sample. A CSV row of the wrong length, or a quote that is
not closed, stops the reading: nobody knows where the captions below it belong.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from data.bad_samples import BadSample
from data.errors import UserError
from data.files.tables import BadTable, csv_rows

TABLE_FORMS = ("jsonl", "csv", "parquet")
Rows = Iterator[tuple[str, dict[str, Any] | BadSample]]
"""Each row with its place, such as metadata.csv:3."""


def table_rows(table: Path, columns: Sequence[str]) -> Rows:
    """Yields the rows of a table, with these columns at least; raises UserError for damage."""
    match table.suffix.lower():
        case ".jsonl":
            return _json_rows(table)
        case ".csv":
            return _csv_rows(table)
    return _parquet_rows(table, columns)


def table_columns(table: Path) -> list[str]:
    """Returns the column names of a table; those of the first rows where rows may differ."""
    match table.suffix.lower():
        case ".jsonl":
            return _json_columns(table)
        case ".csv":
            return _csv_columns(table)
    return _parquet_columns(table)


def _json_rows(table: Path) -> Rows:
    with _open(table) as file:
        for number, line in enumerate(file, 1):
            place = f"{table.name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, BadSample(place, f"not JSON: {error}")
                continue
            yield place, row if isinstance(row, dict) else BadSample(place, "no JSON object")


def _json_columns(table: Path) -> list[str]:
    columns: dict[str, None] = {}
    with _open(table) as file:
        for _, line in zip(range(100), file, strict=False):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            columns.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    return list(columns)


def _csv_rows(table: Path) -> Rows:
    header: list[str] | None = None
    for line, values in _csv_lists(table):
        if header is None:
            header = values
        elif values:
            yield f"{table.name}:{line}", dict(zip(header, values, strict=True))


def _csv_columns(table: Path) -> list[str]:
    return next(_csv_lists(table), (1, []))[1]


def _csv_lists(table: Path) -> Iterator[tuple[int, list[str]]]:
    with _open(table) as file:
        try:
            yield from csv_rows(file)
        except BadTable as error:
            raise UserError(f"{table}:{error.line}{error}.") from None


def _open(table: Path) -> TextIO:
    # Without newline="" a carriage return inside a quoted caption would be lost.
    newline = "" if table.suffix.lower() == ".csv" else None
    return table.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _parquet_rows(table: Path, columns: Sequence[str]) -> Rows:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(table).iter_batches(
            batch_size=4096, columns=list(columns)
        ):
            for row in batch.to_pylist():
                number += 1
                yield f"{table.name}:{number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{table}: damaged Parquet after row {number}: {error}.") from None


def _parquet_columns(table: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_schema(table).names)
    except (ArrowException, OSError) as error:
        raise UserError(f"{table}: cannot be read as Parquet: {error}.") from None
