"""The rows of an evaluation, one per image, in Parquet files that pandas and others read.

images.parquet     what was asked for, and one column for each thing measured
features.parquet   (prompt_index, image) and the rows of numbers that set metrics are made of

Rows are found by (prompt_index, image), never by their place. A measured column says in its field's
metadata by which settings it was measured: asked for with others it is measured again, and nothing
else is. Columns that are not asked for stay. While an evaluation runs, each finished batch is a
file in parts/; a column without values there says that its process could not measure it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.metric import FEATURE_COLUMN, LOGIT_COLUMN, Row

SETTINGS, REFERENCE, REFERENCES = "evaluation.json", "reference.json", "references"
IMAGES, FEATURES, PARTS = "images.parquet", "features.parquet", "parts"
LISTS = (FEATURE_COLUMN, LOGIT_COLUMN)
KEY = ("prompt_index", "image")
DIGEST, VERSION_KEY, VERSION = b"digest", b"blackpoint_rows", b"1"
TYPES: dict[str, Any] = {
    "prompt_index": pa.int64(),
    "image": pa.int64(),
    "prompt": pa.string(),
    "category": pa.string(),
    "seed": pa.int64(),
    "file": pa.string(),
    "asked_where": pa.string(),
    "device": pa.string(),
    "dtype": pa.string(),
    "tf32": pa.bool_(),
    FEATURE_COLUMN: pa.list_(pa.float32()),
    LOGIT_COLUMN: pa.list_(pa.float32()),
}
Key = tuple[int, int]
Columns = Mapping[str, str]
"""Measured column -> digest of the settings that it was measured with."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Columns) -> None:
    """Writes rows, sorted by their key, as one Parquet file; the file is whole or absent."""
    ordered = sorted(rows, key=lambda row: (row["prompt_index"], row["image"]))
    names = list(dict.fromkeys(name for row in ordered for name in row))
    fields, arrays = [], []
    for name in names:
        kind = TYPES.get(name, pa.float64())
        about = {DIGEST: columns[name].encode()} if name in columns else None
        fields.append(pa.field(name, kind, metadata=about))
        arrays.append(pa.array([row.get(name) for row in ordered], kind))
    schema = pa.schema(fields, metadata={VERSION_KEY: VERSION})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())


def read_rows(folder: Path, columns: Columns | None = None) -> dict[Key, Row]:
    """Reads all rows of an evaluation and of its unfinished parts, merged by their key.

    columns: the measured columns that are wanted, with their digests; a column measured with other
    settings is left out. None: whatever there is. Raises UserError for files of another version.
    """
    while True:
        rows: dict[Key, Row] = {}
        try:
            for path in _files(folder):
                for row in _read(path, columns):
                    known = rows.setdefault((row["prompt_index"], row["image"]), {})
                    # What a part has not, such as the file of an image, hides no other part's.
                    known |= {k: v for k, v in row.items() if v is not None or k not in known}
            return rows
        except FileNotFoundError:
            continue  # the first process has joined the parts meanwhile


def carried_columns(folder: Path, asked: Columns) -> dict[str, str]:
    """Returns the measured columns that are there and not asked for, with their digests.

    One that two files measured with different settings is none: it could not be told apart.
    """
    by_column: dict[str, set[str]] = {}
    for path in _files(folder):
        for name, digest in _digests(pq.read_schema(path)).items():
            if name not in asked:
                by_column.setdefault(name, set()).add(digest)
    return {name: digests.pop() for name, digests in by_column.items() if len(digests) == 1}


def join_rows(folder: Path, rows: Mapping[Key, Row], columns: Columns) -> None:
    """Writes images.parquet and, where there are any, features.parquet."""
    lists = [name for name in LISTS if any(name in row for row in rows.values())]
    if lists:
        kept = [{name: row.get(name) for name in (*KEY, *lists)} for row in rows.values()]
        write_rows(folder / FEATURES, kept, columns)
    scalars = [{k: v for k, v in row.items() if k not in LISTS} for row in rows.values()]
    write_rows(folder / IMAGES, scalars, columns)


def read_images(folder: Path) -> list[Row]:
    """Reads images.parquet; raises UserError where there is none or it is of another version."""
    path = folder / IMAGES
    if not path.is_file():
        raise UserError(f"{path} does not exist; `blackpoint evaluate output={folder}` writes it")
    return _read(path, None)


def column_digest(settings: object) -> str:
    """Returns a fingerprint of a column's settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finished_keys(folder: Path, columns: Columns) -> set[Key]:
    """Returns the keys of the rows that have every wanted column, or whose process cannot have it.

    Reads no more than the keys. Files that vanish meanwhile are joined into others.
    """
    by_key: dict[Key, set[str]] = {}
    for path in _files(folder):
        try:
            file = pq.ParquetFile(path)
            keys = file.read(KEY).to_pydict()
        except FileNotFoundError:
            continue
        digests = _digests(file.schema_arrow)
        measured = {name for name, digest in digests.items() if digest == columns.get(name)}
        for prompt_index, image in zip(*keys.values(), strict=True):
            by_key.setdefault((prompt_index, image), set()).update(measured)
    return {key for key, measured in by_key.items() if measured >= columns.keys()}


def _files(folder: Path) -> list[Path]:
    paths = [folder / IMAGES, folder / FEATURES, *sorted((folder / PARTS).glob("*.parquet"))]
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def _read(path: Path, columns: Columns | None) -> list[Row]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); remove it, and the same "
            "command makes its rows again"
        ) from None
    if (table.schema.metadata or {}).get(VERSION_KEY) != VERSION:
        raise UserError(
            f"{path} holds rows of another version; choose another output, or read it with the "
            "version that wrote it"
        )
    if columns is not None:
        digests = _digests(table.schema)
        table = table.drop_columns([n for n, digest in digests.items() if digest != columns.get(n)])
    lists = {name: table.column(name) for name in LISTS if name in table.column_names}
    rows = table.drop_columns(list(lists)).to_pylist()
    for name, column in lists.items():
        present = [row for row, has in zip(rows, column.is_valid().to_pylist(), strict=True) if has]
        for row, values in zip(present, _matrix(column), strict=True):
            row[name] = values
    if columns is None:
        return rows
    # A column that a part did not measure must hide no other part's.
    return [{k: v for k, v in row.items() if v is not None or k not in columns} for row in rows]


def _digests(schema: pa.Schema) -> dict[str, str]:
    """Returns the digest of the settings of each measured column."""
    metadata = {field.name: field.metadata or {} for field in schema}
    return {name: about[DIGEST].decode() for name, about in metadata.items() if DIGEST in about}


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the lists of a column, all of one length, as (N, d) float32; Python's floats take ten
    times the room."""
    whole = column.combine_chunks().drop_null()
    if len(whole) == 0:
        return np.empty((0, 0), np.float32)
    return whole.flatten().to_numpy(zero_copy_only=False).reshape(len(whole), -1)
