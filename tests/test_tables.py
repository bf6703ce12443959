"""CSV of captions and of prompts, read by one reader: nothing is lost, nothing is swallowed."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackpoint.data.files.tables import BadTable, csv_rows
from blackpoint.data.pack.captions import captioned_files, find_captions
from blackpoint.sampling.prompts.prompt_set import read_prompts
from blackpoint.scripts.cli import main
from tests.data_images import encoded, picture

CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=12)


def write_images(folder: Path, table: str, number: int = 3) -> Path:
    folder.mkdir()
    for index in range(number):
        (folder / f"{index}.png").write_bytes(encoded(picture(index)))
    (folder / "metadata.csv").write_text(table, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        ("0.png,a cat, sitting, masterpiece\n1.png,b\n2.png,c\n", 2, "has 4 fields where .* 2;"),
        ("0.png,a\n1.png\n2.png,c\n", 3, "has 1 fields where the header has 2; write as many"),
        ('0.png,"a cat\n1.png,b\n2.png,c\n', 2, "damaged CSV .*; close each quoted field"),
        ('0.png,a\n1.png,"b" c\n2.png,c\n', 3, "damaged CSV"),
        ('0.png,"a\n1.png,"b"\n2.png,c\n', 2, "damaged CSV"),
    ],
)
def test_rows_of_another_length_and_open_quotes_are_refused(
    tmp_path: Path, capsys, rows: str, line: int, reason: str
) -> None:
    import re

    source = write_images(tmp_path / "in", f"file_name,text\n{rows}")
    output = tmp_path / "out"
    arguments = [f"source={source}", f"output={output}", "max_bad_share=1", "num_processes=1"]
    assert main(["data", "pack", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"metadata\.csv:{line}:? {reason}", error), error
    assert "Traceback" not in error and not output.exists()
    prompts = tmp_path / "p.csv"
    prompts.write_text(f"tag,prompt\n{rows}")
    with pytest.raises(ValueError, match=rf"p\.csv line {line}:? {reason}"):
        read_prompts(str(prompts))


def test_what_is_quoted_right_is_read_whole(tmp_path: Path) -> None:
    table = (
        'file_name, text\n0.png,"a cat, sitting"\n\n1.png,"a ""big"" dog\non a wall"\n2.png,it\'s\n'
    )
    source = write_images(tmp_path / "in", table)
    found = [file.captions[0] for file in captioned_files(find_captions(source))]  # type: ignore[union-attr]
    assert found == ["a cat, sitting", 'a "big" dog\non a wall', "it's"]


def test_long_captions_are_no_damage(tmp_path: Path) -> None:
    long = "x" * 200_000
    source = write_images(tmp_path / "in", f"file_name,text\n0.png,{long}\n", 1)
    assert [file.captions[0] for file in captioned_files(find_captions(source))] == [long]  # type: ignore[union-attr]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=4))
def test_a_written_table_is_read_back(rows: list[list[str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["a", "b"], *rows])
    found = [values for _, values in csv_rows(io.StringIO(file.getvalue(), newline=""))]
    assert found == [["a", "b"], *rows]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='ab,"\n ', max_size=40))
def test_any_text_is_a_table_or_is_refused(text: str) -> None:
    """Every row that is given has the header's length: no field was made up and none dropped."""
    try:
        rows = [values for _, values in csv_rows(io.StringIO(text, newline=""))]
    except BadTable as error:
        assert error.line >= 1 and ";" in str(error)
        return
    assert len({len(values) for values in rows if values} | {len(rows[0]) if rows else 0}) == 1
