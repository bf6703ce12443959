"""Tables of text, read strictly: a row has as many fields as the header, every quote is closed.

CSV is RFC 4180's: fields between commas; one that holds a comma, a quote or a line break stands in
double quotes, in which a quote is doubled. Read leniently, `0.png,a cat, sitting` is the caption
"a cat", and an open quote takes the rows below it into one field. TSV has no quoting.
"""

import csv
from collections.abc import Iterable, Iterator

MAX_FIELD_CHARACTERS = 1 << 24
Rows = Iterator[tuple[int, list[str]]]
"""The header, its names stripped, then the rows, each with the number of its first line, from 1.

All of the header's length, but for empty lines: []."""


class BadTable(Exception):
    """A table that can't be read; the message is the rule and the remedy, to follow the place.

    line: number of the line where the row begins, from 1.
    """

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def csv_rows(lines: Iterable[str]) -> Rows:
    """Reads comma-separated lines; raises BadTable."""
    remedy = 'put a text that holds a comma in double quotes, as in 0.png,"a cat, sitting"'
    return _checked(_csv_fields(lines), remedy)


def tsv_rows(lines: Iterable[str]) -> Rows:
    """Reads lines with tabs between their fields; raises BadTable."""
    fields = ((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(lines, 1))
    return _checked(fields, "a text must hold no tab")


def _checked(fields: Rows, remedy: str) -> Rows:
    header = None
    for line, values in fields:
        if header is None:
            header = [name.strip() for name in values]
            yield line, header
        elif len(values) == len(header):
            yield line, values
        elif "".join(values).strip():
            raise BadTable(
                line,
                f" has {len(values)} fields where the header has {len(header)}; write as many, and "
                f"{remedy}",
            )
        else:
            yield line, []


def _csv_fields(lines: Iterable[str]) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "most likely a quote is never closed" if "limit" in str(error) else ""
            raise BadTable(
                line,
                f": damaged CSV ({error}{reason and '; '}{reason}); close each quoted field and "
                "double the quotes inside it",
            ) from None
        yield line, values
