"""An image folder with captions -> a stream of (key, path, caption).

Four forms are known, and which one was found is said:

- `sidecar`: beside each image a .txt file of the same name.
- `jsonl`, `csv`, `parquet`: one file at the top of the folder, metadata.jsonl or any other name,
  whose rows name an image (relative to the folder) and its caption.

Folders are walked recursively and in one order; names that begin with a dot are left out. Nothing
but the names of one directory, and for the last three forms 8 bytes an image, is held in memory.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from data.bad_samples import BadSample
from data.caption_tables import TABLE_FORMS, table_columns, table_rows
from data.decode import IMAGE_SUFFIXES, BadImage, decode_caption
from data.errors import UserError
from data.files.walk import visible_files
from data.fingerprints import Fingerprints
from data.source_file import MAX_CAPTION_BYTES, read_source_file

CaptionForm = Literal["auto", "sidecar", "jsonl", "csv", "parquet"]

_NOT_CAPTIONS = ("readme", "license", "licence", "requirements")
_EITHER_CASE = tuple(case for suffix in IMAGE_SUFFIXES for case in (suffix, suffix.upper()))
_TWIN_ENDINGS = tuple(f".{suffix}" for suffix in _EITHER_CASE)


class CaptionedFile(NamedTuple):
    """One image on disk and its caption; `name` is relative to the folder, fit to print."""

    key: str
    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of `folder` are."""

    folder: Path
    form: CaptionForm
    table: Path | None = None
    file_column: str = "file_name"
    caption_column: str = "text"

    def __str__(self) -> str:
        if self.table is None:
            return "sidecar .txt files"
        return f"{self.table.name} (columns {self.file_column}, {self.caption_column})"


@dataclass
class FolderCount:
    """What a folder holds, by kind."""

    num_images: int = 0
    num_sidecars: int = 0
    other_suffixes: dict[str, int] = field(default_factory=dict)


def count_files(folder: Path) -> FolderCount:
    """Counts images, .txt files that have an image beside them, and files of other suffixes."""
    count = FolderCount()
    for _, names in walk(folder):
        for name in names:
            suffix = _suffix(name)
            if suffix in IMAGE_SUFFIXES:
                count.num_images += 1
            elif suffix == "txt" and _images_beside(names, name):
                count.num_sidecars += 1
            else:
                count.other_suffixes[suffix] = count.other_suffixes.get(suffix, 0) + 1
    return count


def find_captions(
    folder: Path,
    form: CaptionForm = "auto",
    file_column: str = "file_name",
    caption_column: str = "text",
    count: FolderCount | None = None,
) -> CaptionSource:
    """Returns the one caption source of `folder`; raises UserError for none and for several."""
    count = count or count_files(folder)
    tables = _tables(folder, file_column, caption_column)
    if form != "auto":
        tables = [table for table in tables if _suffix(table.name) == form]
    found = [f"{table.name}" for table in tables]
    if count.num_sidecars and form in ("auto", "sidecar"):
        found.append(f"{count.num_sidecars} sidecar .txt files")
    if len(found) > 1:
        raise UserError(
            f"source={folder}: captions come from {' and from '.join(found)}. "
            "Choose one with captions=sidecar, jsonl, csv or parquet, or remove the others."
        )
    if not found:
        nested = _nested_table(folder)
        hint = f" {nested} is below it: name its folder as source." if nested else ""
        raise UserError(
            f"source={folder}: no captions (captions={form}) for {count.num_images} images."
            f"{hint} Put a .txt beside each image, or one metadata.jsonl, .csv or .parquet with "
            f"columns {file_column} and {caption_column} at the top of the folder."
        )
    if not tables:
        return CaptionSource(folder, "sidecar")
    kind = _suffix(tables[0].name)
    return CaptionSource(folder, kind, tables[0], file_column, caption_column)  # type: ignore[arg-type]


def captioned_files(source: CaptionSource) -> Iterator[CaptionedFile | BadSample]:
    """Yields every image of the folder once, with its caption or the reason why it has none."""
    if source.table is None:
        yield from _from_sidecars(source.folder)
    else:
        yield from _from_table(source, source.table)


def sample_key(folder: Path, name: str) -> str:
    """Returns the WebDataset key of image `name` (relative to `folder`).

    It is the name without its suffix. WebDataset ends a key at the first dot, so dots inside are
    written %2E (and % as %25); when several images differ only in their suffix, "%suffix" follows.
    """
    path = PurePosixPath(name)
    stem = path.with_suffix("").name
    directory = folder / path.parent
    num_twins = sum((directory / f"{stem}.{suffix}").exists() for suffix in _EITHER_CASE)
    return _key(path, num_twins)


def _key(path: PurePosixPath, num_twins: int) -> str:
    key = str(path.with_suffix("")).replace("%", "%25").replace(".", "%2E")
    key = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return key if num_twins <= 1 else f"{key}%{path.suffix[1:]}"


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (directory relative to `folder`, sorted file names), following links once."""
    try:
        yield from visible_files(folder)
    except OSError as error:
        raise UserError(
            f"source={folder}: cannot read {error.filename}: {error.strerror}."
        ) from None


def _from_sidecars(folder: Path) -> Iterator[CaptionedFile | BadSample]:
    for directory, names in walk(folder):
        for name in names:
            if _suffix(name) not in IMAGE_SUFFIXES:
                continue
            relative = os.path.join(directory, name)
            siblings = _same_stem(names, name)
            captions = [sibling for sibling in siblings if _suffix(sibling) == "txt"]
            if not captions:
                missing = _printable(os.path.splitext(name)[0])
                yield BadSample(_printable(relative), f"no caption: no {missing}.txt beside it")
                continue
            try:
                caption_path = folder / directory / captions[-1]
                caption = decode_caption(read_source_file(caption_path, MAX_CAPTION_BYTES))
            except BadImage as reason:
                yield BadSample(_printable(relative), str(reason))
                continue
            num_twins = sum(sibling.endswith(_TWIN_ENDINGS) for sibling in siblings)
            key = _key(PurePosixPath(relative), num_twins)
            yield CaptionedFile(key, _printable(relative), folder / relative, caption)
        for name in names:
            stem = os.path.splitext(name)[0]
            if _suffix(name) != "txt" or stem.lower() in _NOT_CAPTIONS:
                continue
            if not _images_beside(names, name):
                relative = os.path.join(directory, name)
                yield BadSample(_printable(relative), "no image beside the caption")


def _same_stem(names: Sequence[str], name: str) -> list[str]:
    """Returns those of the sorted `names` that differ from `name` only in their suffix."""
    stem = os.path.splitext(name)[0]
    found = []
    for place in range(bisect_left(names, f"{stem}."), len(names)):
        if not names[place].startswith(f"{stem}."):
            break
        if os.path.splitext(names[place])[0] == stem:
            found.append(names[place])
    return found


def _images_beside(names: Sequence[str], name: str) -> bool:
    return any(_suffix(sibling) in IMAGE_SUFFIXES for sibling in _same_stem(names, name))


def _from_table(source: CaptionSource, table: Path) -> Iterator[CaptionedFile | BadSample]:
    seen = Fingerprints()
    for place, row in table_rows(table, (source.file_column, source.caption_column)):
        if isinstance(row, BadSample):
            yield row
            continue
        name, caption = row.get(source.file_column), row.get(source.caption_column)
        if not isinstance(name, str) or not name.strip():
            yield BadSample(place, f"no image: {source.file_column} is empty")
            continue
        name = os.path.normpath(name.strip())
        if not seen.add(name):
            yield BadSample(_printable(name), f"named again in {place}")
            continue
        yield _named_file(source, name, caption)
    for directory, names in walk(source.folder):
        for file_name in names:
            name = os.path.join(directory, file_name)
            if _suffix(file_name) in IMAGE_SUFFIXES and name not in seen:
                yield BadSample(_printable(name), f"no caption: not named in {table.name}")


def _named_file(source: CaptionSource, name: str, caption: Any) -> CaptionedFile | BadSample:
    """Returns image `name` of a table, its name and caption checked."""
    shown = _printable(name)
    path = source.folder / name
    if os.path.isabs(name) or name.startswith(".."):
        return BadSample(shown, "no image: the name leads out of the folder")
    if _suffix(name) not in IMAGE_SUFFIXES:
        return BadSample(shown, f"no image: suffix is none of {', '.join(IMAGE_SUFFIXES)}")
    if "\0" in name or not path.is_file():
        return BadSample(shown, "no image: no such file")
    if caption is not None and not isinstance(caption, str):
        return BadSample(shown, f"no caption: {source.caption_column} is no text")
    try:
        encoded = (caption or "").encode("utf-8", "surrogateescape")
        key = sample_key(source.folder, name)
        return CaptionedFile(key, shown, path, decode_caption(encoded))
    except (BadImage, UnicodeEncodeError) as reason:
        return BadSample(shown, str(reason))


def _tables(folder: Path, file_column: str, caption_column: str) -> list[Path]:
    """Returns the tables at the top of `folder`; one called metadata must have the columns."""
    tables = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or _suffix(path.name) not in TABLE_FORMS:
            continue
        columns = table_columns(path)
        if file_column in columns and caption_column in columns:
            tables.append(path)
        elif path.stem == "metadata":
            raise UserError(
                f"{path}: needs columns {file_column} and {caption_column}, has "
                f"{', '.join(columns) or 'none'}. Rename them, or set file_column and "
                "caption_column."
            )
    return tables


def _nested_table(folder: Path) -> Path | None:
    for directory, names in walk(folder):
        for name in names:
            if directory and name.startswith("metadata.") and _suffix(name) in TABLE_FORMS:
                return folder / directory / name
    return None


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
