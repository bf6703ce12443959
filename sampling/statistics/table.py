"""Tables: rows and their columns, stated once, as CSV, Markdown, HTML or plain values.

A row maps columns to values. A column has a format, Python's own (".3f", "+.3g n"), which its
numbers and estimates are shown by; text is shown as it is, None and what is not finite as nothing.
An `Estimate` takes four columns of CSV: value, low, high and n.
"""

import csv
import gzip
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.statistics.estimates import Estimate

Row = TypeVar("Row")


@dataclass(frozen=True)
class Marked:
    """A value with more than its column's format shows."""

    value: Any
    detail: str = ""
    """Small print that follows it."""
    is_bold: bool = False


@dataclass(frozen=True)
class Place:
    """Contents of one place of a table."""

    text: str
    detail: str = ""
    is_bold: bool = False
    number: float | None = None

    @property
    def words(self) -> str:
        return " ".join(filter(None, [self.text, self.detail]))

    @property
    def markdown(self) -> str:
        text = f"**{self.text}**" if self.is_bold and self.text else self.text
        return " ".join(filter(None, [text, self.detail])).replace("|", "\\|")

    @property
    def html(self) -> str:
        mark = ' class="best"' if self.is_bold else ""
        value = "" if self.number is None else f' data-value="{self.number}"'
        detail = f"<span>{escape(self.detail)}</span>" if self.detail else ""
        return f"<td{mark}{value}><b>{escape(self.text)}</b>{detail}</td>"


@dataclass
class Table:
    """Rows, and how they are shown."""

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column -> format, in order; not set: the columns of the rows, without formats."""
    title: str = ""
    note: str = ""
    name: str = ""
    """Name of its files and of its element of a page."""
    headings: Mapping[str, str] = field(default_factory=dict)
    """Column -> heading, where that is not the column itself."""
    filters: Sequence[str] = ()
    """Columns by whose values the rows of a page are chosen."""

    def __post_init__(self) -> None:
        if not self.columns:
            self.columns = dict.fromkeys((column for row in self.rows for column in row), "")

    @classmethod
    def of(cls, columns: Mapping[str, str], lines: Iterable[Sequence[Any]]) -> "Table":
        """Makes a table of lines that have a value for each column, in their order."""
        return cls([dict(zip(columns, line, strict=True)) for line in lines], columns)

    @property
    def header(self) -> list[str]:
        """The headings, in order."""
        return [self.headings.get(column, column) for column in self.columns]

    def places(self) -> list[list[Place]]:
        """Returns the contents of each place, row by row."""
        return [[_place(row.get(c), form) for c, form in self.columns.items()] for row in self.rows]

    def values(self) -> tuple[list[str], list[list[Any]]]:
        """Returns header and rows with numbers as numbers, None where there is nothing."""
        values = [[_values(row.get(column)) for column in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*values, strict=True)]
        widths = widths or [1] * len(self.columns)
        header = [
            heading + end
            for heading, width in zip(self.header, widths, strict=True)
            for end in ("", ": low", ": high", ": n")[:width]
        ]
        lines = [
            [v for cell, size in zip(row, widths, strict=True) for v in (*cell, *[None] * 3)[:size]]
            for row in values
        ]
        return header, lines

    def csv(self) -> str:
        """Writes `values` as CSV, numbers to eight digits."""
        header, lines = self.values()
        return _csv(header, ([f"{v:.8g}" if isinstance(v, float) else v for v in x] for x in lines))

    def markdown(self) -> str:
        """Writes the table alone as Markdown; columns of numbers stand to the right."""
        places = self.places()
        lines = [self.header, *([cell.markdown for cell in row] for row in places)]
        text = [f"| {' | '.join(line)} |" for line in lines]
        columns = list(zip(*places, strict=True)) or [()] * len(self.columns)
        text.insert(
            1, f"|{'|'.join('--:' if _is_numeric(column) else '---' for column in columns)}|"
        )
        return "\n".join(text) + "\n"

    def text(self) -> str:
        """Writes the table alone for a terminal, its columns under their headings."""
        places = self.places()
        lines = [self.header, *([cell.words for cell in row] for row in places)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        columns = list(zip(*places, strict=True)) or [()] * len(self.columns)
        signs = [">" if _is_numeric(column) else "<" for column in columns]
        lines.insert(1, ["-" * width for width in widths])
        forms = list(zip(signs, widths, strict=True))
        shown = (
            "  ".join(f"{cell:{sign}{width}}" for cell, (sign, width) in zip(x, forms, strict=True))
            for x in lines
        )
        return "".join(f"{line.rstrip()}\n" for line in shown)

    def html(self) -> str:
        """Writes the table alone as HTML, with the numbers that a page sorts it by."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.header)
        rows = (f"<tr>{''.join(cell.html for cell in row)}</tr>" for row in self.places())
        start = f'<table id="{self.name}">' if self.name else "<table>"
        start += f"\n<thead><tr>{head}</tr></thead>\n<tbody>"
        return "\n".join([start, *rows, "</tbody>\n</table>"])


def write_csv(path: Path, rows: Iterable[Any], columns: Sequence[str] = ()) -> None:
    """Writes rows, dataclasses or mappings, as CSV, gzipped where the file's name ends in .gz.

    Numbers to the last digit; equal rows make equal files; the file is whole or as it was before.
    All rows have the columns of the first. columns: those of a file without rows.
    """
    plain = [row if isinstance(row, Mapping) else asdict(row) for row in rows]
    header = list(plain[0]) if plain else columns
    content = _csv(header, ([row[column] for column in header] for row in plain)).encode()
    write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def read_csv(path: Path, row_type: type[Row]) -> list[Row]:
    """Reads rows of a dataclass of texts and numbers that `write_csv` wrote.

    Raises UserError for a file with other columns.
    """
    types: dict[str, Any] = {column.name: column.type for column in fields(row_type)}  # type: ignore[arg-type]
    columns, rows = _read(path)
    if columns != list(types):
        raise UserError(f"{path} has columns {columns}; its rows need {list(types)}")
    return [row_type(**{name: types[name](row[name]) for name in types}) for row in rows]


def read_texts(path: Path) -> list[dict[str, str]]:
    """Reads rows, whatever their columns, as texts."""
    return _read(path)[1]


def _read(path: Path) -> tuple[Sequence[str] | None, list[dict[str, str]]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    reader = csv.DictReader(io.StringIO(text))
    return reader.fieldnames, list(reader)


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def _place(value: Any, form: str, detail: str = "", is_bold: bool = False) -> Place:
    if isinstance(value, Marked):
        return _place(value.value, form, value.detail, value.is_bold)
    if isinstance(value, Estimate):
        text, _, interval = format(value, form).partition(" ")
        return Place(text, f"{interval} {detail}".strip(), is_bold, value.value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Place("" if value is None else str(value), detail, is_bold)
    if not math.isfinite(value):
        return Place("", detail)
    return Place(format(value, form.partition(" ")[0]), detail, is_bold, value)


def _values(value: Any) -> Sequence[Any]:
    if isinstance(value, Marked):
        inner = _values(value.value)
        return [f"{inner[0]} {value.detail}"] if value.detail else inner
    if isinstance(value, Estimate):
        return value.value, value.low, value.high, value.n
    return [None if isinstance(value, float) and not math.isfinite(value) else value]


def _is_numeric(places: Sequence[Place]) -> bool:
    shown = [cell for cell in places if cell.text]
    return bool(shown) and all(cell.number is not None and not cell.detail for cell in shown)
