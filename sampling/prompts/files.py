"""Files of prompts in the formats that people publish, read a line at a time.

    .txt      one prompt per line (T2I-CompBench: one file per category, color_val.txt is "color")
    .jsonl    one object per line (GenEval: `prompt`, and `tag` for the task; Pick-a-Pic: `caption`)
    .tsv      a header, then fields between tabs, no quoting (PartiPrompts: `Prompt`, `Category`)
    .csv      a header, then fields with the usual quoting (DrawBench: `Prompts`, `Category`)
    .parquet  a table (Pick-a-Pic: `caption`)

Names of fields are compared without case. Whatever else a row holds becomes its metadata; columns
of a Parquet file that hold no text, number or truth value (images) are never read.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from sys import intern
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.tables import BadTable, Rows, csv_rows, tsv_rows

TEXT_FIELDS = ("prompt", "prompts", "caption", "text")
CATEGORY_FIELDS = ("category", "tag")
SUFFIXES = (".txt", ".jsonl", ".tsv", ".csv", ".parquet")
T2I_COMPBENCH_CATEGORIES = (
    "color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "complex", "numeracy",
)  # fmt: skip

PromptRow = tuple[str, str, dict[str, Any]]
"""Text, category ("" if it has none), and the other fields."""

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""Stands for a half of two in JSON (\\ud83d), and for bytes that are not UTF-8 on a command line;
no encoder of texts and no file takes it."""
NO_METADATA: dict[str, Any] = {}
"""Shared by all rows that hold a prompt alone, so that a million of them stay small."""


def prompt_file_rows(path: Path, is_category: bool = False) -> Iterator[PromptRow | None]:
    """Yields the rows of a file, None for each that holds no prompt; raises UserError.

    is_category: whether a .txt file is named for the category of its prompts; T2I-CompBench's
    always are.
    """
    match path.suffix.lower():
        case ".txt":
            category = file_category(path)
            known = category in T2I_COMPBENCH_CATEGORIES
            return _text_rows(path, category if is_category or known else "")
        case ".jsonl":
            return _json_rows(path)
        case ".tsv":
            return _table_rows(path, tsv_rows(line for _, line in _lines(path)))
        case ".csv":
            return _table_rows(path, csv_rows(line for _, line in _lines(path)))
        case ".parquet":
            return _parquet_rows(path)
    raise UserError(
        f"prompts={path}: not a format of prompts; give a {', '.join(SUFFIXES[:-1])} or "
        f"{SUFFIXES[-1]} file"
    )


def file_category(path: Path) -> str:
    """Returns the category that a file of prompts is named for: color_val_seen.txt is color."""
    return re.sub(r"_(train|val)(_[a-z]+)?$", "", path.stem)


def _text_rows(path: Path, category: str) -> Iterator[PromptRow | None]:
    for _, line in _lines(path):
        text = line.strip()
        yield (text, category, NO_METADATA) if text else None


def _json_rows(path: Path) -> Iterator[PromptRow | None]:
    decode = json.JSONDecoder().decode
    chosen: dict[tuple[str, ...], tuple[str, str | None]] = {}  # most rows have the same fields
    for number, line in _lines(path):
        if line.isspace():
            yield None
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{_place(path, number)} is not JSON ({error}); write one object per line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{_place(path, number)} is {type(row).__name__}, not an object; "
                'write {"prompt": "..."}'
            )
        names = tuple(row)
        if names not in chosen:
            chosen[names] = _chosen_fields(_place(path, number), names)
        yield _row(row, *chosen[names], path, number)


def _table_rows(path: Path, rows: Rows) -> Iterator[PromptRow | None]:
    try:
        _, header = next(rows, (1, []))
        chosen = _chosen_fields(_place(path, 1), header)
        for number, values in rows:
            if values:
                yield _row(dict(zip(header, values, strict=True)), *chosen, path, number)
            else:
                yield None
    except BadTable as error:
        raise UserError(f"{_place(path, error.line)}{error}") from None


def _parquet_rows(path: Path) -> Iterator[PromptRow | None]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            chosen = _chosen_fields(f"prompts={path}", names)
            kept = [f.name for f in file.schema_arrow if f.name in chosen or _is_plain(f.type)]
            for batch in file.iter_batches(batch_size=4096, columns=kept):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, *chosen, path, number)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"prompts={path}: damaged Parquet after row {number} ({error}); write it anew"
        ) from None


def _is_plain(column_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    kinds = ("string", "large_string", "integer", "floating", "boolean")
    return any(getattr(types, f"is_{kind}")(column_type) for kind in kinds)


def _chosen_fields(place: str, names: Sequence[str]) -> tuple[str, str | None]:
    """Returns the names of the fields that hold the prompt and its category."""
    known = {name.lower(): name for name in reversed(names)}
    text = next((known[name] for name in TEXT_FIELDS if name in known), None)
    if text is None:
        raise UserError(
            f"{place} has no field called {', '.join(TEXT_FIELDS[:-1])} or {TEXT_FIELDS[-1]}, but "
            f"{', '.join(map(repr, names[:8])) or 'nothing'}; name the one with the prompt so"
        )
    return text, next((known[name] for name in CATEGORY_FIELDS if name in known), None)


def _row(
    row: dict[str, Any], text_field: str, category_field: str | None, path: Path, number: int
) -> PromptRow | None:
    text = row.pop(text_field)
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{_place(path, number)}: {text_field}={text!r:.60} is not text; put it in quotes"
        )
    text = text.strip()
    if not text:
        return None
    category = row.pop(category_field) if category_field is not None else None
    category = "" if category is None else intern(str(category))
    if half := HALF_CHARACTER.search(text + category):
        raise UserError(
            f"{_place(path, number)}: {half[0]!r} is half of a character; write it whole, or leave "
            "it out"
        )
    return text, category, row or NO_METADATA


def _place(path: Path, number: int) -> str:
    return f"prompts={path} {'row' if path.suffix.lower() == '.parquet' else 'line'} {number}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and text of each line; one that is not UTF-8 raises UserError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UserError(
                        f"{_place(path, number)} is not UTF-8 text; save it as UTF-8"
                    ) from None
    except OSError as error:
        raise UserError(
            f"prompts={path} cannot be read ({error.strerror}); look at its permissions"
        ) from None
