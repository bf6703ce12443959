"""Laws of tables of captions: where they lie, which are one, and which are chosen."""

import itertools
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.pack.caption_parts import common_pattern, grouped, named
from blackpoint.data.pack.caption_tables import CaptionFields, find_tables
from blackpoint.data.pack.captions import CaptionedFile, captioned_files, find_captions
from blackpoint.data.pack.image_folder import walk
from blackpoint.data.pack.kohya_metadata import metadata_rows
from tests.packed_captions import (
    captions_of,
    image_rows,
    message,
    packed,
    remedies,
    samples_of,
    write_images,
    write_parquet,
)


@pytest.mark.parametrize("where", ["in", "in/sub", "in/link", ".", "other"])
def test_a_table_means_the_same_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    images = write_images(tmp_path, ["in/0.png", "in/sub/0.png", "store/0.png", "other/0.png"])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    table = tmp_path / where / "caps.csv"
    table.write_text("file_name,text\n0.png,meant\n")
    monkeypatch.chdir(tmp_path)
    meant = {"in/sub": "sub/0", "in/link": "link/0"}.get(where, "0")
    image = {"in/sub": "in/sub/0.png", "in/link": "store/0.png"}.get(where, "in/0.png")
    relative = os.path.relpath(table, "in")
    tables = [relative, f"./{relative}", str(table), os.path.realpath(table)]
    tables += [f"{tmp_path}/other/../{where}/caps.csv", str(table.with_name("c*.csv"))]
    for number, (source, name) in enumerate(itertools.product(["in", tmp_path / "alias"], tables)):
        packed(source, tmp_path / f"{number}", captions_file=name, max_bad_share=0.9)
        samples = samples_of(tmp_path / f"{number}")
        assert samples == {meant: (images[image], ("meant",))}, (source, name)


COLUMNS = ("file_name", "text")


def test_keys_of_embedded_images_are_the_same_however_their_table_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "in" / "deep" / "a.parquet"
    write_parquet(table, image_rows(range(2)))
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["deep/a.parquet", str(table), "../in/deep/*.parquet"]):
        packed("in", tmp_path / f"{number}", captions_file=name)
        assert list(captions_of(tmp_path / f"{number}")) == [f"deep/a/{n:08d}" for n in range(2)]


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (("train/0000.parquet", "test/0000.parquet"), "**/0000.parquet"),
        (("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"), "**/[0-9]*.parquet"),
        (("train/metadata.csv", "test/metadata.csv"), "**/metadata.csv"),
        (("captions_01.csv", "captions_02.csv"), "captions_[0-9]*.csv"),
        (("train/x-00-of-02.csv", "train/x-01-of-02.csv", "test/x-00-of-02.csv"), None),
        (("train/x-0-of-1.jsonl", "test/x-0-of-1.jsonl"), "**/x-0-of-1.jsonl"),
    ],
)
def test_what_may_be_splits_or_versions_is_one_only_when_named(
    tmp_path: Path, names: tuple[str, ...], patterns: str | None
) -> None:
    tables = [tmp_path / name for name in names]
    if patterns is None:
        with pytest.raises(UserError, match="1 of 2 parts of test/x"):
            grouped(tables, tmp_path)
        return
    parts = grouped(tables, tmp_path)
    assert len(parts) == 2 and all(len({path.parent for path in p.paths}) == 1 for p in parts)
    for table in tables:
        table.parent.mkdir(exist_ok=True)
        table.touch()
    pattern = common_pattern(parts, tmp_path)
    assert pattern is not None and pattern == patterns
    assert set(named(pattern, tmp_path).paths) == set(tables)
    for part in parts:
        assert named(part.pattern, tmp_path).paths == part.paths


@pytest.mark.parametrize(
    "names",
    [
        ("0000.parquet", "0001.parquet"),
        ("a/0000.parquet", "a/0007.parquet"),
        ("x-0-of-2.csv", "x-1-of-2.csv"),
        ("a/x-0-of-2.csv", "b/x-1-of-2.csv"),
    ],
)
def test_tables_that_say_so_are_parts_of_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    [parts] = grouped([tmp_path / name for name in names], tmp_path)
    assert parts.names == names


def test_a_part_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    names = ["x-0-of-2-ab.csv", "x-1-of-2-ab.csv", "x-1-of-2-cd.csv"]
    with pytest.raises(UserError, match=r"twice \(x-1-of-2-ab.csv, x-1-of-2-cd.csv\)"):
        grouped([tmp_path / name for name in names], tmp_path)


def test_a_message_names_few_of_many_tables(tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{n}/a.png" for n in range(7)])
    for number in range(7):
        (tmp_path / "in" / f"{number}" / "metadata.csv").write_text("file_name,text\na.png,x\n")
    text = message(tmp_path / "in", tmp_path / "out")
    assert "and from 3 tables more" in text
    packed(tmp_path / "in", tmp_path / "out", **remedies(text)[-1])
    assert len(captions_of(tmp_path / "out")) == 7


@pytest.mark.parametrize("own", ["txt", "csv"])
def test_what_lies_beside_texts_for_other_programs_is_left_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    folder = tmp_path / "in"
    write_images(folder, ["a.png"])
    for suffix in ("txt", "caption") if own == "txt" else ("caption",):
        (folder / f"a.{suffix}").write_text(f"from {suffix}")
    if own == "csv":
        (folder / "metadata.csv").write_text("file_name,text\na.png,from csv\n")
    (folder / "meta_cap.json").write_text('{"a": {"caption": "from kohya"}}')
    write_parquet(folder / "thumbnails.parquet", [{"image": image_rows(range(1))[0]["image"]}])
    packed(folder, tmp_path / "out")
    assert captions_of(tmp_path / "out") == {"a": (f"from {own}",)}
    [note] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert "meta_cap.json" in note
    for number, choice in enumerate(remedies(note)):
        packed(folder, tmp_path / f"{number}", **choice)
    assert captions_of(tmp_path / "0") == {"a": ("from kohya",)}
    assert captions_of(tmp_path / f"{number}") == {"a": ("from caption",)}


def test_of_two_kinds_of_other_programs_one_must_be_chosen(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png"])
    (tmp_path / "in" / "a.caption").write_text("from caption")
    (tmp_path / "in" / "meta_cap.json").write_text('{"a": {"caption": "from kohya"}}')
    choices = remedies(message(tmp_path / "in", tmp_path / "out"))
    assert choices == [{"captions_file": "meta_cap.json"}, {"captions": "caption"}]
    for number, choice in enumerate(choices):
        packed(tmp_path / "in", tmp_path / f"{number}", **choice)
    assert captions_of(tmp_path / "0") == {"a": ("from kohya",)}
    assert captions_of(tmp_path / "1") == {"a": ("from caption",)}


@pytest.mark.parametrize("content", [{"caption": "a cat"}, {"image": {"caption": "x"}}])
def test_json_beside_an_image_is_not_kohyas_metadata(
    tmp_path: Path, content: dict[str, object]
) -> None:
    write_images(tmp_path / "in", ["meta_a.png"])
    (tmp_path / "in" / "meta_a.json").write_text(json.dumps({"text": "a cat"} | content))
    (tmp_path / "in" / "meta_info.json").write_text('{"version": 1}')
    packed(tmp_path / "in", tmp_path / "out")
    assert captions_of(tmp_path / "out") == {"meta_a": ("a cat",)}


@pytest.mark.parametrize(
    ("caption", "whole", "by_line"),
    [
        (None, "t, u", "t, u"),
        ("", "t, u", "t, u"),
        (" \n", "t, u", "t, u"),
        ("a\n\nb", "a\n\nb, t, u", "a, t, u\nb, t, u"),
        (["a", "", None, " "], ["a, t, u"], ["a, t, u"]),
        (["a", "b\nc"], ["a, t, u", "b\nc, t, u"], ["a, t, u", "b, t, u\nc, t, u"]),
        ([""], ["t, u"], ["t, u"]),
        ([], ["t, u"], ["t, u"]),
    ],
)
def test_no_caption_of_kohya_loses_its_tags(
    tmp_path: Path, caption: object, whole: object, by_line: object
) -> None:
    table = tmp_path / "meta_cap.json"
    table.write_text(json.dumps({"b": {"caption": caption, "tags": " t\nu "}}))
    for lines, expected in ((False, whole), (True, by_line)):
        [(_, row)] = metadata_rows(table, COLUMNS, lines)
        assert row == {"file_name": "b", "text": expected}
    table.write_text(json.dumps({"b": {"caption": "a", "tags": ["t"]}}))
    [(_, value)] = metadata_rows(table, COLUMNS, False)
    assert isinstance(value, BadSample) and "tags is no text" in value.reason


@pytest.mark.parametrize("form", ["csv", "kohya"])
def test_names_that_are_too_long_are_of_no_file(tmp_path: Path, form: str) -> None:
    longest = "x" * 251 + ".png"  # with .jpeg in place of .png it could not be
    write_images(tmp_path / "in", [longest])
    names = [longest, "x" * 256 + ".png", f"{'y/' * 3000}a.png", "a\0.png"]
    if form == "csv":
        rows = "".join(f"{name},a cat\n" for name in names)
        (tmp_path / "in" / "metadata.csv").write_text(f"file_name,text\n{rows}")
    else:
        entries = {name: {"caption": "a cat"} for name in names}
        (tmp_path / "in" / "meta_cap.json").write_text(json.dumps(entries))
    entries = list(captioned_files(find_captions(tmp_path / "in")))
    assert [entry.key for entry in entries if isinstance(entry, CaptionedFile)] == ["x" * 251]
    reasons = [entry.reason for entry in entries if isinstance(entry, BadSample)]
    assert reasons == ["no image: no such file"] * 3


@pytest.mark.parametrize("captions_file", [None, "train.parquet"])
def test_images_inside_parquet_are_taken_where_its_names_have_no_files(
    tmp_path: Path, captions_file: str | None
) -> None:
    rows = [row | {"file_name": f"{n}.png"} for n, row in enumerate(image_rows(range(2)))]
    write_parquet(tmp_path / "in" / "train.parquet", rows)
    packed(tmp_path / "in", tmp_path / "inside", captions_file=captions_file)
    assert samples_of(tmp_path / "inside") == {
        f"train/{n:08d}": (row["image"]["bytes"], (row["text"],)) for n, row in enumerate(rows)
    }
    files = write_images(tmp_path / "in", ["1.png", "0.png"])
    packed(tmp_path / "in", tmp_path / "named", captions_file=captions_file)
    assert samples_of(tmp_path / "named") == {
        f"{n}": (files[f"{n}.png"], (f"row {n}",)) for n in range(2)
    }


def test_the_search_for_tables_holds_no_path_of_an_image(tmp_path: Path) -> None:
    for number in range(16):
        (tmp_path / f"{number}").mkdir()
        for image in range(250):
            (tmp_path / f"{number}" / f"meta_{image}.png").touch()
            (tmp_path / f"{number}" / f"meta_{image}.json").touch()
    fields = CaptionFields()
    tracemalloc.start()
    try:
        assert find_tables(tmp_path, walk(tmp_path), "auto", fields, False, True) == []
        assert tracemalloc.get_traced_memory()[1] < 500_000  # 8000 Paths are more than 1 MB
    finally:
        tracemalloc.stop()
