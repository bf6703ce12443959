"""Laws of caption sources: what rivals write is read as they mean it, or refused with a remedy."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from blackpoint.data.caption_text import (
    caption_members,
    checked_captions,
    json_captions,
    text_captions,
)
from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.images.decode import BadImage
from blackpoint.data.index.index import INDEX_FOLDER, build_index
from blackpoint.data.pack.embedded_images import EmbeddedImages
from blackpoint.data.pack.pack import PackConfig
from blackpoint.scripts.cli import main
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


def test_caption_sidecars_of_kohya_are_read(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "deep/b.png"])
    (tmp_path / "in" / "a.caption").write_text("a cat\n")
    (tmp_path / "in" / "deep" / "b.caption").write_text("a dog")
    result = packed(tmp_path / "in", tmp_path / "out")
    assert result.caption_source == "sidecar .caption files" and not result.ignored_suffixes
    assert captions_of(tmp_path / "out") == {"a": ("a cat",), "deep/b": ("a dog",)}


def test_json_sidecars_are_captions_where_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_images(folder, ["a.png", "b.png", "c.png"])
    written = {"a": {"caption": "a cat", "id": 1}, "b": {"text": "a dog"}}
    written["c"] = {"caption": ["a sofa", " a red sofa ", ""], "made": "by hand"}
    for name, values in written.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    assert packed(folder, tmp_path / "out").caption_source == "sidecar .json files"
    assert captions_of(tmp_path / "out") == {
        "a": ("a cat",),
        "b": ("a dog",),
        "c": ("a sofa", "a red sofa"),
    }
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["a.png", "a.txt", "a.json", "b.png", "b.txt", "b.json"] + [
            "c.png",
            "c.json",
        ]
        member = tar.extractfile("c.json")
        assert member is not None
        assert json.load(member) == {"caption": ["a sofa", "a red sofa"], "made": "by hand"}
    for name in written:
        (folder / f"{name}.txt").write_text("a text")
    packed(folder, tmp_path / "text")
    assert set(captions_of(tmp_path / "text").values()) == {("a text",)}


def test_every_line_is_a_caption_only_where_that_is_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "in" / "a.txt").write_text("a cat\n\n  a big cat\r\n")
    (tmp_path / "in" / "b.txt").write_text("a dog\n")
    packed(tmp_path / "in", tmp_path / "whole")
    assert captions_of(tmp_path / "whole")["a"] == ("a cat\n\n  a big cat",)
    packed(tmp_path / "in", tmp_path / "lines", caption_lines=True)
    assert captions_of(tmp_path / "lines") == {"a": ("a cat", "a big cat"), "b": ("a dog",)}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_list_in_a_table_is_several_captions(tmp_path: Path, form: str) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png", "c.png", "d.png"])
    lists: list[Any] = [["one", "two"], ["one"], [None, "one"], []]
    rows = [{"file_name": f"{name}.png", "text": lists[n]} for n, name in enumerate("abcd")]
    if form == "jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "in" / "metadata.jsonl").write_text(lines)
    else:
        write_parquet(tmp_path / "in" / "metadata.parquet", rows)
    result = packed(tmp_path / "in", tmp_path / "out", max_bad_share=0.3)
    assert captions_of(tmp_path / "out") == {"a": ("one", "two"), "b": ("one",), "c": ("one",)}
    assert [tuple(sample) for sample in result.bad] == [("d.png", "empty caption")]


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(str.strip)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.booleans())
def test_any_captions_come_back_from_a_shard(texts: list[str], with_extra: bool) -> None:
    try:
        captions = checked_captions(texts, "text")
    except BadImage as reason:
        assert str(reason) == "empty caption"  # nothing but a byte order mark
        return
    extra = b'{"caption": "of before", "half": "\\ud800"}' if with_extra else None
    name, content = next(iter(caption_members(captions, extra).items()))
    assert (name == "txt") == (len(captions) == 1)
    assert (text_captions if name == "txt" else json_captions)(content) == captions


def test_shards_with_several_captions_are_indexed_alike_by_anyone(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "in" / "a.txt").write_text("one\ntwo\nthree of them")
    (tmp_path / "in" / "b.txt").write_text("one")
    packed(tmp_path / "in", tmp_path / "out", caption_lines=True)
    before = (tmp_path / "out" / INDEX_FOLDER / "records.npy").read_bytes()
    report = check(CheckConfig(str(tmp_path / "out"), num_processes=1))
    assert report.index.state == "valid" and not report.bad
    assert report.captions is not None and report.captions.num_several == 1
    assert report.captions.characters["maximum"] == len("three of them")
    (tmp_path / "out" / INDEX_FOLDER).rename(tmp_path / "index")
    assert build_index(tmp_path / "out") == []
    assert (tmp_path / "out" / INDEX_FOLDER / "records.npy").read_bytes() == before


@pytest.mark.parametrize("with_folder", [False, True])
def test_kohyas_metadata_is_read_as_its_trainer_does(tmp_path: Path, with_folder: bool) -> None:
    folder = tmp_path / "in"
    write_images(folder, ["a.png", "b.v1.png", "deep/c.png", "d.png"])
    entries = {
        "a": {"caption": "a cat", "tags": "1cat, sofa"},
        "b.v1": {"tags": "1dog"},
        str(folder / "deep" / "c.png") if with_folder else "deep/c": {"caption": "a horse"},
        "d.png": {"caption": "one\ntwo", "train_resolution": [512, 512], "tags": "x"},
    }
    (folder / "meta_cap.json").write_text(json.dumps(entries))
    assert "meta_cap.json" in packed(folder, tmp_path / "out").caption_source
    expected = {
        "a": ("a cat, 1cat, sofa",),
        "b%2Ev1": ("1dog",),
        "deep/c": ("a horse",),
        "d": ("one\ntwo, x",),
    }
    assert captions_of(tmp_path / "out") == expected
    packed(folder, tmp_path / "lines", caption_lines=True)
    assert captions_of(tmp_path / "lines") == expected | {"d": ("one, x", "two, x")}


def test_what_kohyas_metadata_lacks_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_images(folder, ["a.png", "b.png", "b.jpg", "c.png"])
    entries = {"a": {"caption": ""}, "b": {"caption": "x"}, "gone": {"caption": "x"}, "c": 3}
    (tmp_path / "elsewhere.json").write_text(json.dumps(entries | {"/etc/x.png": {"tags": "x"}}))
    text = message(folder, tmp_path / "out", captions_file=str(tmp_path / "elsewhere.json"))
    for reason in (
        "a.png: empty caption",
        "b: no image: b.jpg and b.png are of that name",
        "/etc/x.png: no image: no such file",
        "gone: no image: no such file",
        "no caption: no JSON object",
        "no caption: not named in",
    ):
        assert reason in text, (reason, text)
    (folder / "meta_cap.json").write_text("[1]")
    assert "meta_cap.json is no JSON object of objects" in message(folder, tmp_path / "out")
    for choice in ({"captions": "kohya"}, {"captions_file": "meta_cap.json"}):
        assert "is no JSON object of images" in message(folder, tmp_path / "out", **choice)


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
@pytest.mark.parametrize("where", ["", "data"])
def test_images_inside_split_parquet_are_packed(
    tmp_path: Path, row_group_size: int, where: str
) -> None:
    rows = image_rows(range(25))
    for part, numbers in enumerate((range(0, 10), range(10, 20), range(20, 25))):
        path = tmp_path / "in" / where / f"train-{part:05d}-of-00003.parquet"
        write_parquet(path, [rows[n] for n in numbers], row_group_size)
    result = packed(tmp_path / "in", tmp_path / "out", samples_per_shard=4)
    assert (result.num_samples, result.num_shards, result.bad) == (25, 7, [])
    assert "3 parts" in result.caption_source
    found = list(samples_of(tmp_path / "out").items())
    assert [sample for _, sample in found] == [
        (row["image"]["bytes"], (row["text"],)) for row in rows
    ]
    prefix = f"{where}/" if where else ""
    assert found[13][0] == f"{prefix}train-00001-of-00003/00000003"
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        suffixes = [name.rpartition(".")[2] for name in tar.getnames()]
    assert suffixes == ["png", "txt", "jpg", "txt"] * 2


@pytest.mark.slow
def test_two_processes_pack_parquet_as_one_does(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", image_rows(range(25)), 7)
    for num in (1, 2):
        packed(tmp_path / "in", tmp_path / f"{num}", samples_per_shard=4, num_processes=num)
    for shard in (tmp_path / "1").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "2" / shard.name).read_bytes()


def test_embedded_images_are_streamed_whatever_the_row_group(tmp_path: Path) -> None:
    """One row group of 64 MB costs less memory than that: its pages are read one by one."""
    content = bytes(range(256)) * 4096  # 1 MiB
    rows = [{"image": {"bytes": n.to_bytes(4, "big") + content, "path": "x"}} for n in range(64)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=64, write_batch_size=4)
    del rows, table
    before, most = pyarrow.total_allocated_bytes(), 0
    with EmbeddedImages("image") as images:
        for row in (0, 3, 4, 40, 63, 2):
            assert images.read(tmp_path / "a.parquet", row)[:4] == row.to_bytes(4, "big")
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 32 << 20


def test_rows_of_parquet_without_a_usable_image_are_named(tmp_path: Path) -> None:
    rows = image_rows(range(20))
    rows[3]["image"]["bytes"] = None
    rows[4]["image"]["bytes"] = b"<html>"
    rows[5]["text"] = None
    write_parquet(tmp_path / "in" / "a.parquet", rows, 6)
    result = packed(tmp_path / "in", tmp_path / "out", max_bad_share=0.3)
    reasons = dict(result.bad)
    assert set(reasons) == {"a.parquet:4", "a.parquet:5", "a.parquet:6"}
    assert "no bytes" in reasons["a.parquet:4"] and "not an image" in reasons["a.parquet:5"]
    assert "empty caption" in reasons["a.parquet:6"] and result.num_samples == 17


def test_parquet_with_images_says_which_columns_it_needs(tmp_path: Path) -> None:
    rows = [{"image": row["image"], "caption": row["text"]} for row in image_rows(range(3))]
    write_parquet(tmp_path / "in" / "a.parquet", rows)
    text = message(tmp_path / "in", tmp_path / "out")
    assert "needs columns image and text, has image, caption" in text and "caption_column" in text
    packed(tmp_path / "in", tmp_path / "out", caption_column="caption")
    assert len(captions_of(tmp_path / "out")) == 3


def test_captions_in_several_parts_are_one_table(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(6)]
    write_images(tmp_path / "in", names)
    rows = [{"file_name": name, "text": f"of {name}"} for name in names]
    for part in range(2):
        write_parquet(tmp_path / "in" / f"captions-{part:04d}.parquet", rows[part::2])
    result = packed(tmp_path / "in", tmp_path / "out")
    assert "2 parts captions-0000.parquet to captions-0001.parquet" in result.caption_source
    assert captions_of(tmp_path / "out") == {f"{n}": (f"of {n}.png",) for n in range(6)}


def test_two_tables_are_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png"])
    for name in ("a", "b"):
        row = {"file_name": f"{name}.png", "text": f"from {name}"}
        write_parquet(tmp_path / "in" / f"{name}.parquet", [row])
    text = message(tmp_path / "in", tmp_path / "out", captions="parquet")
    assert remedies(text) == [{"captions_file": "a.parquet"}, {"captions_file": "b.parquet"}]
    packed(tmp_path / "in", tmp_path / "a", captions_file="a.parquet", max_bad_share=0.5)
    assert captions_of(tmp_path / "a") == {"a": ("from a",)}
    packed(tmp_path / "in", tmp_path / "both", captions_file="*.parquet")
    assert captions_of(tmp_path / "both") == {"a": ("from a",), "b": ("from b",)}


def test_two_splits_of_a_data_set_are_not_mixed(tmp_path: Path) -> None:
    rows = image_rows(range(9))
    for split, numbers in {"train": range(0, 6), "test": range(6, 9)}.items():
        half = len(numbers) // 2
        for part, own in enumerate((numbers[:half], numbers[half:])):
            path = tmp_path / "in" / "data" / f"{split}-{part:05d}-of-00002.parquet"
            write_parquet(path, [rows[n] for n in own])
    text = message(tmp_path / "in", tmp_path / "out")
    for choice in remedies(text):  # as typed on a command line
        pattern = choice["captions_file"]
        arguments = [f"source={tmp_path / 'in'}", f"output={tmp_path / pattern[5:8]}"]
        assert main(["data", "pack", *arguments, f"captions_file={pattern}"]) == 0
    assert len(captions_of(tmp_path / "tra")) == 6 and len(captions_of(tmp_path / "tes")) == 3


def test_a_missing_part_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    for part in (0, 2):
        path = tmp_path / "in" / f"train-{part:05d}-of-00003.parquet"
        write_parquet(path, image_rows(range(part, part + 2)))
    text = message(tmp_path / "in", tmp_path / "out")
    assert "1 of 3 parts" in text and "first number 00001" in text
    packed(tmp_path / "in", tmp_path / "out", **remedies(text)[0])
    assert len(captions_of(tmp_path / "out")) == 4
    (tmp_path / "in" / "train-00002-of-00003.parquet").unlink()
    assert "2 of 3 parts" in message(tmp_path / "in", tmp_path / "one")


def test_tables_below_the_top_name_images_beside_them(tmp_path: Path) -> None:
    names = ["one/a.png", "one/deep/b.png", "two/c.png"]
    write_images(tmp_path / "in", names)
    for folder, own in {"one": ["a.png", "deep/b.png"], "two": ["c.png"]}.items():
        lines = [json.dumps({"file_name": name, "text": f"{folder} {name}"}) for name in own]
        (tmp_path / "in" / folder / "metadata.jsonl").write_text("\n".join(lines))
    choices = remedies(message(tmp_path / "in", tmp_path / "out"))
    assert [choice["captions_file"] for choice in choices] == [
        "one/metadata.jsonl",
        "two/metadata.jsonl",
        "**/metadata.jsonl",
    ]
    packed(tmp_path / "in", tmp_path / "out", **choices[-1])
    assert captions_of(tmp_path / "out") == {
        "one/a": ("one a.png",),
        "one/deep/b": ("one deep/b.png",),
        "two/c": ("two c.png",),
    }


def test_files_of_captions_that_can_not_be_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png"])
    (tmp_path / "in" / "a.txt").write_text("x")
    (tmp_path / "in" / "b.csv").write_text("file_name,text\na.png,x\n")
    (tmp_path / "in" / "c.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    for name, words in {
        "absent.csv": "captions_file=absent.csv: no such file",
        "a.txt": "is no .jsonl, .csv, .parquet or .json",
        "[bc].*": "names csv and jsonl files",
    }.items():
        assert words in message(tmp_path / "in", tmp_path / "out", captions_file=name)
    text = message(tmp_path / "in", tmp_path / "out", captions_file="b.csv", captions="jsonl")
    assert "captions_file=b.csv and captions=jsonl" in text
    assert PackConfig("a", "b").captions_file is None
