"""Tables and pages: one statement of rows and parts, the same content in every form."""

import csv
import io
import math
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report.page import Choice, Facts, Figure, Gallery, Items, Page, Section
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import Marked, Table, read_csv, write_csv

ESTIMATE = Estimate(0.5, 0.25, 0.75, 8)


@dataclass
class Row:
    """A row of each type that a file of rows can have."""

    name: str
    number: int
    value: float


class Text(HTMLParser):
    """The text of each place of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.places: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("th", "td"):
            self.places.append("")

    def handle_data(self, data: str) -> None:
        if self.places:
            self.places[-1] += data.strip("\n")


@pytest.mark.parametrize(
    "form, text",
    [
        (".2f", "0.50 [0.25, 0.75]"),
        ("+.2f n", "+0.50 [+0.25, +0.75] n = 8"),
        (".1%", "50.0% [25.0, 75.0]"),
        ("", "0.5 [0.25, 0.75]"),
    ],
)
def test_an_estimate_is_written_with_its_interval(form: str, text: str) -> None:
    assert format(ESTIMATE, form) == text


def test_an_estimate_without_interval_says_so() -> None:
    alone = Estimate(1.0, math.nan, math.nan, 1)
    assert f"{alone:.1f n}" == "1.0 [too few for an interval] n = 1"


def test_a_table_says_the_same_in_every_form() -> None:
    rows = [
        {"what": "a|<b>", "score": Marked(ESTIMATE, is_bold=True), "seconds": 1.26},
        {"what": None, "score": None, "seconds": math.nan, "not a column": 1},
        {"what": "c", "score": Marked("lost", "killed"), "seconds": 30},
    ]
    table = Table(rows, {"what": "", "score": ".1f n", "seconds": ".1f"}, headings={"what": "WHAT"})
    assert table.markdown().splitlines() == [
        "| WHAT | score | seconds |",
        "|---|---|--:|",
        "| a\\|<b> | **0.5** [0.2, 0.8] n = 8 | 1.3 |",
        "|  |  |  |",
        "| c | lost killed | 30.0 |",
    ]
    first, *found = csv.reader(io.StringIO(table.csv()))
    assert first == ["WHAT", "score", "score: low", "score: high", "score: n", "seconds"]
    assert found[0] == ["a|<b>", "0.5", "0.25", "0.75", "8", "1.26"]
    assert found[1] == [""] * 6 and found[2] == ["c", "lost killed", "", "", "", "30"]
    html = table.html()
    assert Text(html).places == ["WHAT", "score", "seconds"] + [
        *("a|<b>", "0.5[0.2, 0.8] n = 8", "1.3", "", "", "", "c", "lostkilled", "30.0")
    ]
    assert html.count("data-value") == 3 and html.count('class="best"') == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=False), st.text(alphabet='ab,"\n', max_size=9))))
def test_raw_rows_keep_every_digit(values: list[tuple[float, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_csv(path, [{"value": value, "text": text} for value, text in values], ["value"])
        found = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert [(float(row["value"]), row["text"]) for row in found] == values


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_typed_rows_are_read_back(tmp_path: Path, name: str) -> None:
    rows = [Row('a "c", d', 2, 1 / 3), Row("", -1, 3.0)]
    write_csv(tmp_path / name, rows)
    assert read_csv(tmp_path / name, Row) == rows
    content = (tmp_path / name).read_bytes()
    write_csv(tmp_path / name, rows)
    assert (tmp_path / name).read_bytes() == content
    write_csv(tmp_path / name, [{"other": 1}])
    with pytest.raises(UserError, match=r"has columns \['other'\]; its rows need \['name'"):
        read_csv(tmp_path / name, Row)


def test_a_page_says_the_same_as_html_and_as_markdown() -> None:
    table = Table(
        [{"name": "<x>", "value": 1.0}], {"name": "", "value": ".1f"}, "Numbers", "a note"
    )
    page = Page(
        "A & b",
        [
            "See `make demo`.",
            None,
            Items("left out", []),
            Items("Remarks", ["one", "two"]),
            Section("Results", [table, Figure("Curve", "<svg></svg>", "falls")]),
            Section("left out", [None, Items("", []), Section("also", [])]),
            Choice("score", [table]),
            Gallery("Found", [("winner", ["data:image/png;base64,xx"])], captions=["a cat"]),
            Facts("Settings", {"seed": 1}),
        ],
    )
    html = page.html()
    assert "<h1>A &amp; b</h1>" in html and "<code>make demo</code>" in html
    assert "<h2>Results</h2>" in html and "<h3>Numbers</h3>" in html and "&lt;x&gt;" in html
    assert "left out" not in html and html.count("<svg>") == 1 and html.count("<img src") == 1
    assert "<summary>Settings</summary>" in html and "<dt>seed</dt><dd>1</dd>" in html
    text = page.markdown()
    start = (
        "# A & b\n\nSee `make demo`.\n\n## Remarks\n\n- one\n- two\n\n## Results\n\n### Numbers\n\n"
    )
    assert text.startswith(
        start + "a note\n\n| name | value |\n|---|--:|\n| <x> | 1.0 |\n\n### Curve"
    )
    assert "![Curve](curve.svg)\n\nfalls" in text and text.endswith("- seed: 1\n")
    assert "left out" not in text


def test_a_table_for_a_terminal_has_its_columns_under_one_another() -> None:
    table = Table.of({"part": "", "GB": ".2f"}, [("weights", 3.4), ("a longer name", 12.0)])
    assert table.text().splitlines() == [
        "part              GB",
        "-------------  -----",
        "weights         3.40",
        "a longer name  12.00",
    ]
    assert Table([], {"a": "", "b": ""}).text() == "a  b\n-  -\n"
