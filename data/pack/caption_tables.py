"""Tables of captions, metadata.jsonl, .csv or .parquet: which files are that, columns and rows.

A .jsonl line that is no object is one bad sample. A CSV row of the wrong length, or a quote that is
not closed, stops the reading: nobody knows where the captions below it belong.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.tables import BadTable, csv_rows
from blackpoint.data.pack.embedded_images import embedded_column, opened
from blackpoint.data.pack.image_folder import has_image_beside, suffix_of
from blackpoint.data.pack.kohya_metadata import is_metadata, is_metadata_name, metadata_rows

TABLE_FORMS = ("jsonl", "csv", "parquet")
Rows = Iterator[tuple[str, dict[str, Any] | BadSample]]
"""Each row with its place, such as metadata.csv:3."""


@dataclass(kw_only=True)
class CaptionFields:
    """Where captions stand in what holds them."""

    file_column: str = "file_name"
    """Column of a captions table that names the image, relative to the table's folder, or to
    source where the table lies outside it."""
    caption_column: str = "text"
    """Column of a captions table that holds the caption, or a list of captions; of a .json beside
    an image the field, where it has no "caption"."""
    image_column: str = "image"
    """Column of Parquet files that holds the images themselves."""
    caption_lines: bool = False
    """Takes every line of a text for a caption of its own, as kohya's enable_wildcard and
    SimpleTuner do; training draws one per epoch. Lists in JSON and Parquet are that in any case."""


def table_rows(table: Path, columns: Sequence[str], lines: bool = False) -> Rows:
    """Yields the rows of a table, with these columns at least; raises UserError for damage.

    `lines`: every line of a caption in kohya's metadata is one.
    """
    match table.suffix.lower():
        case ".json":
            return metadata_rows(table, columns, lines)
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
            return next(_csv_lists(table), (1, []))[1]
    with opened(table) as file:
        return file.schema_arrow.names


def find_tables(
    folder: Path,
    listing: Iterable[tuple[str, list[str]]],
    form: str,
    fields: CaptionFields,
    has_sidecars: bool,
    has_image_files: bool,
) -> list[Path]:
    """Returns those files of a listing of `folder` that are tables of captions, and of `form`.

    Raises UserError for one called metadata that lacks the columns, and for one with images in it
    where there are no other captions.
    """
    tables, lacking = list[Path](), list[Path]()
    for directory, names in listing:
        for name in names:
            path, suffix = folder / directory / name, suffix_of(name)
            if is_metadata_name(name):
                is_meant = form == "kohya" or (form == "auto" and is_metadata(path))
                if is_meant and not has_image_beside(names, name) and path.is_file():
                    tables.append(path)
            elif suffix in TABLE_FORMS and form in ("auto", suffix) and path.is_file():
                columns = set(table_columns(path))
                if {fields.file_column, fields.caption_column} <= columns:
                    tables.append(path)
                elif path.stem == "metadata":
                    table_kind(path, fields, has_image_files)  # refuses what lacks columns
                    tables.append(path)
                elif _holds_images(path, fields):
                    (tables if fields.caption_column in columns else lacking).append(path)
    if lacking and not tables and not has_sidecars:
        table_kind(lacking[0], fields, has_image_files)
    return tables


def table_kind(table: Path, fields: CaptionFields, has_image_files: bool) -> str:
    """Returns "kohya", the suffix, or "parquet with images"; raises UserError without columns.

    Without image files that rows could name, images inside Parquet are meant.
    """
    suffix = suffix_of(table.name)
    if suffix == "json":
        return "kohya"
    if suffix not in TABLE_FORMS:
        raise UserError(f"{table}: is no .jsonl, .csv, .parquet or .json file of captions")
    columns, has_images = table_columns(table), _holds_images(table, fields)
    names_files = has_image_files or not has_images
    if names_files and {fields.file_column, fields.caption_column} <= set(columns):
        return suffix
    if has_images and fields.caption_column in columns:
        return f"{suffix} with images"
    wanted = fields.image_column if has_images else fields.file_column
    raise UserError(
        f"{table}: needs columns {wanted} and {fields.caption_column}, has "
        f"{', '.join(columns) or 'none'}; rename them, or set file_column (image_column for images "
        "inside Parquet) and caption_column"
    )


def _holds_images(table: Path, fields: CaptionFields) -> bool:
    is_parquet = suffix_of(table.name) == "parquet"
    return is_parquet and embedded_column(table, fields.image_column) is not None


def _json_rows(table: Path) -> Rows:
    with _open(table) as file:
        for number, line in enumerate(file, 1):
            where = f"{table.name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, BadSample(where, f"not JSON: {error}")
                continue
            yield where, row if isinstance(row, dict) else BadSample(where, "no JSON object")


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


def _csv_lists(table: Path) -> Iterator[tuple[int, list[str]]]:
    with _open(table) as file:
        try:
            yield from csv_rows(file)
        except BadTable as error:
            raise UserError(f"{table}:{error.line}{error}") from None


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
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: damaged Parquet after row {number}: {error}") from None
