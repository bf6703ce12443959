"""An image folder with captions -> a stream of (key, path, captions).

These forms are known, and which one was found is said:

- `sidecar`, `caption`, `json`: beside each image a .txt, a .caption or a .json of the same name.
- `jsonl`, `csv`, `parquet`: a table whose rows name an image, relative to the table's folder (to
  the image folder if the table lies outside it), and its caption: metadata.jsonl or any other
  name, at the top of the folder or, where nothing is there, below it; in several parts, too
  (data/pack/caption_parts.py).
- `parquet` with the images inside it, as Hugging Face's datasets (data/pack/embedded_images.py).
- `kohya`: meta_cap.json or another meta_*.json (data/pack/kohya_metadata.py).

Folders are walked recursively and in one order; names that begin with a dot are left out. Nothing
but the names of one directory, and for tables 8 bytes per image, is held in memory; kohya's file is
read as a whole.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.caption_text import checked_captions
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage
from blackpoint.data.pack.caption_parts import Parts, common_pattern, grouped, named
from blackpoint.data.pack.caption_sidecars import captions_beside
from blackpoint.data.pack.caption_tables import TABLE_FORMS, find_tables, table_kind, table_rows
from blackpoint.data.pack.caption_tables import CaptionFields as CaptionFields
from blackpoint.data.pack.embedded_images import image_sizes, opened
from blackpoint.data.pack.fingerprints import Fingerprints
from blackpoint.data.pack.image_folder import CaptionedFile as CaptionedFile
from blackpoint.data.pack.image_folder import (
    FolderCount,
    count_files,
    has_image_beside,
    printable,
    row_key,
    suffix_of,
    walk,
)
from blackpoint.data.pack.image_folder import sample_key as sample_key
from blackpoint.data.pack.kohya_metadata import image_name, is_metadata_name

CaptionForm = Literal["auto", "sidecar", "caption", "json", "jsonl", "csv", "parquet", "kohya"]
_SIDECARS: dict[str, str] = {"sidecar": "txt", "caption": "caption", "json": "json"}
"""Suffix of the files beside images, by form."""
MAX_SHOWN = 4
"""Tables that a message names one by one."""


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of `folder` are."""

    folder: Path
    form: CaptionForm
    tables: Parts | None = None
    fields: CaptionFields = field(default_factory=CaptionFields)
    is_embedded: bool = False
    """Whether the tables hold the images."""

    def __str__(self) -> str:
        each_line = ", one per line" if self.fields.caption_lines else ""
        if self.tables is None:
            return f"sidecar .{_SIDECARS[self.form]} files{each_line}"
        shown = self.tables.shown(self.folder)
        if self.form == "kohya":
            return f"{shown} (kohya's metadata){each_line}"
        first = self.fields.image_column if self.is_embedded else self.fields.file_column
        return f"{shown} (columns {first}, {self.fields.caption_column}){each_line}"

    def num_embedded(self) -> int:
        """Returns how many images the tables hold."""
        num_images = 0
        for path in self.tables.paths if self.tables and self.is_embedded else ():
            with opened(path) as file:
                num_images += file.metadata.num_rows
        return num_images


def find_captions(
    folder: Path,
    form: CaptionForm = "auto",
    fields: CaptionFields | None = None,
    count: FolderCount | None = None,
    captions_file: str | None = None,
) -> CaptionSource:
    """Returns the one caption source of `folder`; raises UserError for none and for several.

    `captions_file` names a table, or several by a pattern, that are the source whatever else lies
    there.
    """
    count = count or count_files(folder)
    fields, has_files = fields or CaptionFields(), count.num_images > 0
    if captions_file is not None:
        return _from_parts(folder, named(captions_file, folder), fields, form, has_files)
    kinds = [kind for kind in ("sidecar", "caption") if form in ("auto", kind)]
    kinds = [kind for kind in kinds if count.num_sidecars.get(_SIDECARS[kind])]
    top = next(walk(folder))
    tables = grouped(find_tables(folder, [top], form, fields, bool(kinds), has_files), folder)
    if not tables and not kinds:
        tables = grouped(find_tables(folder, walk(folder), form, fields, False, has_files), folder)
    if not tables and not kinds and form in ("auto", "json") and count.num_sidecars.get("json"):
        kinds = ["json"]
    if form == "auto" and len(tables) + len(kinds) > 1:
        tables, kinds = _preferred(folder, tables, kinds, fields, count)
    if len(tables) + len(kinds) > 1:
        raise _ambiguous(folder, tables, kinds, count)
    if tables:
        return _from_parts(folder, tables[0], fields, "auto", has_files)
    if not kinds:
        others = [n for n in top[1] if is_metadata_name(n) and not has_image_beside(top[1], n)]
        hint = f"; {others[0]} is no JSON object of objects" if others else ""
        raise UserError(
            f"source={folder}: no captions (captions={form}) for {count.num_images} images{hint}; "
            "put a .txt, .caption or .json beside each image, or one metadata.jsonl, .csv or "
            f".parquet with columns {fields.file_column} and {fields.caption_column} at the top of "
            "the folder"
        )
    return CaptionSource(folder, kinds[0], fields=fields)  # type: ignore[arg-type]


def captioned_files(source: CaptionSource) -> Iterator[CaptionedFile | BadSample]:
    """Yields every image of the folder once, with its captions or the reason why it has none."""
    fields = source.fields
    if source.tables is None:
        suffix = _SIDECARS[source.form]
        yield from captions_beside(
            source.folder, suffix, fields.caption_column, fields.caption_lines
        )
        return
    seen = Fingerprints()
    for table, table_name in zip(source.tables.paths, source.tables.names, strict=True):
        if source.is_embedded:
            yield from _from_embedded(source, table, printable(table_name))
        else:
            yield from _from_table(source, table, os.path.dirname(table_name), seen)
    for directory, names in walk(source.folder):
        for file_name in names:
            name = os.path.join(directory, file_name)
            if suffix_of(file_name) in IMAGE_SUFFIXES and name not in seen:
                shown = source.tables.shown(source.folder)
                yield BadSample(printable(name), f"no caption: not named in {shown}")


def _from_table(
    source: CaptionSource, table: Path, table_folder: str, seen: Fingerprints
) -> Iterator[CaptionedFile | BadSample]:
    """Yields the images of a table; those of one outside the folder are relative to the folder."""
    fields = source.fields
    columns = fields.file_column, fields.caption_column
    for where, row in table_rows(table, columns, fields.caption_lines):
        if isinstance(row, BadSample):
            yield row
            continue
        name, caption = map(row.get, columns)
        if not isinstance(name, str) or not name.strip():
            yield BadSample(where, f"no image: {fields.file_column} is empty")
            continue
        name = name.strip()
        try:
            if source.form == "kohya":
                name = image_name(source.folder, name)
            elif not os.path.isabs(table_folder):
                name = os.path.join(table_folder, name)
        except BadImage as reason:
            yield BadSample(printable(name), str(reason))
            continue
        name = os.path.normpath(name)
        if not seen.add(name):
            yield BadSample(printable(name), f"named again in {where}")
            continue
        yield _named_file(source, name, caption)


def _named_file(source: CaptionSource, name: str, caption: Any) -> CaptionedFile | BadSample:
    """Returns image `name` of a table, its name and captions checked."""
    shown, fields = printable(name), source.fields
    path = source.folder / name
    if os.path.isabs(name) or name.startswith(".."):
        return BadSample(shown, "no image: the name leads out of the folder")
    if suffix_of(name) not in IMAGE_SUFFIXES:
        return BadSample(shown, f"no image: suffix is none of {', '.join(IMAGE_SUFFIXES)}")
    if not os.path.isfile(path):  # False for a name that is too long, or no name
        return BadSample(shown, "no image: no such file")
    try:
        captions = checked_captions(caption, fields.caption_column, fields.caption_lines)
        return CaptionedFile(sample_key(source.folder, name), shown, path, captions)
    except (BadImage, UnicodeEncodeError) as reason:
        return BadSample(shown, str(reason))


def _from_embedded(
    source: CaptionSource, table: Path, name: str
) -> Iterator[CaptionedFile | BadSample]:
    fields = source.fields
    sizes = image_sizes(table, fields.image_column)
    for row, ((_, values), size) in enumerate(
        zip(table_rows(table, (fields.caption_column,)), sizes, strict=True)
    ):
        shown = f"{name}:{row + 1}"
        assert not isinstance(values, BadSample), "Parquet has no lines that could be damaged"
        try:
            caption = values[fields.caption_column]
            captions = checked_captions(caption, fields.caption_column, fields.caption_lines)
        except BadImage as reason:
            yield BadSample(shown, str(reason))
            continue
        key = row_key(name.lstrip("/"), row)
        yield CaptionedFile(key, shown, table, captions, row, size)


def _from_parts(
    folder: Path, parts: Parts, fields: CaptionFields, form: CaptionForm, has_files: bool
) -> CaptionSource:
    """Returns the source that some tables are, all of one kind; raises UserError."""
    kinds = sorted({table_kind(path, fields, has_files) for path in parts.paths})
    suffixes = {kind.partition(" ")[0] for kind in kinds}
    if len(kinds) > 1 or (form != "auto" and suffixes != {form}):
        asked = "" if form == "auto" else f" and captions={form}"
        raise UserError(
            f"captions_file={parts.pattern}{asked}: names {' and '.join(kinds)} files; name "
            "tables of one kind, and leave captions at auto"
        )
    kind, _, images = kinds[0].partition(" ")
    return CaptionSource(folder, kind, parts, fields, bool(images))  # type: ignore[arg-type]


def _preferred(
    folder: Path,
    tables: list[Parts],
    kinds: list[str],
    fields: CaptionFields,
    count: FolderCount,
) -> tuple[list[Parts], list[str]]:
    """Returns the .txt sidecars, or the one table of names, alone where they lie beside others.

    The forms of other programs lie there for those programs: .caption files, kohya's metadata,
    Parquet with images inside. They are named in a note.
    """
    has_files = count.num_images > 0
    main_tables = [t for t in tables if table_kind(t.paths[0], fields, has_files) in TABLE_FORMS]
    main_kinds = [kind for kind in kinds if kind == "sidecar"]
    if len(main_tables) + len(main_kinds) != 1:
        return tables, kinds
    chosen, _ = _choices(folder, main_tables, main_kinds, count)
    others = [parts for parts in tables if parts not in main_tables]
    sources, remedies = _choices(folder, others, [k for k in kinds if k not in main_kinds], count)
    print(
        f"note: source={folder}: captions come from {chosen[0]}; {' and '.join(sources)} left "
        f"aside; "
        f"take those with {' or '.join(remedies)}",
        file=sys.stderr,
        flush=True,
    )
    return main_tables, main_kinds


def _choices(
    folder: Path, tables: Sequence[Parts], kinds: Sequence[str], count: FolderCount
) -> tuple[list[str], list[str]]:
    """Returns the sources in words, and the setting that chooses each."""
    sources = [parts.shown(folder) for parts in tables[:MAX_SHOWN]]
    remedies = [f"captions_file={parts.pattern!r}" for parts in tables[:MAX_SHOWN]]
    if len(tables) > MAX_SHOWN:
        sources.append(f"{len(tables) - MAX_SHOWN} tables more")
    for kind in kinds:
        suffix = _SIDECARS[kind]
        sources.append(f"{count.num_sidecars[suffix]} sidecar .{suffix} files")
        remedies.append(f"captions={kind}")
    return sources, remedies


def _ambiguous(
    folder: Path, tables: Sequence[Parts], kinds: Sequence[str], count: FolderCount
) -> UserError:
    sources, remedies = _choices(folder, tables, kinds, count)
    pattern = common_pattern(tables, folder)
    together = f", or take them as one with captions_file={pattern!r}" if pattern else ""
    return UserError(
        f"source={folder}: captions come from {' and from '.join(sources)}; choose one with "
        f"{' or '.join(remedies)}{together}, or remove the others"
    )
