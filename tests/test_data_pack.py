"""Laws of `data pack`: what goes in comes out, what is bad is named, nothing is overwritten."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import decode
from blackpoint.data.images.luminance import luminance
from blackpoint.data.index.contents import STAMPS_FILE
from blackpoint.data.index.index import RECORD, Index, build_index
from blackpoint.data.pack.captions import CaptionedFile, captioned_files, find_captions, sample_key
from blackpoint.data.pack.pack import PackConfig, pack
from tests.data_images import encoded, picture, write_damaged, write_folder


def packed(source: Path, output: Path, **options: object):
    settings: dict[str, object] = {"num_processes": 1, **options}
    return pack(PackConfig(str(source), str(output), **settings))  # type: ignore[arg-type]


def in_index(folder: Path) -> dict[str, tuple[bytes, str, np.void]]:
    """Reads {key: (image bytes, caption, record)} by the offsets of the index alone."""
    index = Index(folder)
    samples = {}
    for number, record in enumerate(index.records):
        content = (folder / index.shard_names[record["shard"]]).read_bytes()
        image = content[record["image_offset"] :][: record["image_size"]]
        caption = content[record["caption_offset"] :][: record["caption_size"]].decode()
        samples[index.key(number)] = (image, caption, record)
    return samples


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name]


def test_packed_bytes_are_the_files_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 25)
    long_name = source / ("n" * 180 + ".jpg")
    long_name.write_bytes(encoded(picture(99), "JPEG"))
    long_name.with_suffix(".txt").write_text("a long name: \u00e9\u4e2d")
    result = packed(source, tmp_path / "out", samples_per_shard=10)
    assert (result.num_samples, result.num_shards, result.bad) == (26, 3, [])
    samples = in_index(tmp_path / "out")
    assert len(samples) == 26
    for path in source.rglob("*.[pj][np]g"):
        key = sample_key(source, str(path.relative_to(source)))
        image, caption, record = samples[key]
        assert image == path.read_bytes()
        assert caption == path.with_suffix(".txt").read_text().strip()
        assert (record["width"], record["height"]) == (24, 16)
        assert record["luminance"] == pytest.approx(luminance(decode(image)), abs=1e-6)


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    packed(write_folder(tmp_path / "in", 12), tmp_path / "out", samples_per_shard=5)
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    ours = in_index(tmp_path / "out")
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in theirs] == list(ours)
    for sample in theirs:
        image, caption, _ = ours[sample["__key__"]]
        assert (sample["png"], sample["txt"].decode()) == (image, caption)


def test_the_index_written_while_packing_equals_the_one_built_from_the_tars(
    tmp_path: Path,
) -> None:
    packed(write_folder(tmp_path / "in", 12), tmp_path / "out", samples_per_shard=5)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for shard in (tmp_path / "out").glob("*.tar"):
        (foreign / shard.name).write_bytes(shard.read_bytes())
    assert build_index(foreign) == []
    for name in ("records.npy", "keys.bin", "shards.json", "bad_samples.jsonl"):
        ours, theirs = (tmp_path / "out" / "index" / name, foreign / "index" / name)
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert np.load(foreign / "index" / "records.npy").dtype == RECORD


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 6)
    for name in ("a", "b"):
        packed(source, tmp_path / name)
    stamps = tmp_path / "a" / "index" / STAMPS_FILE  # when each shard was written
    for path in set((tmp_path / "a").rglob("*.*")) - {stamps}:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def write_table(folder: Path, form: str, name: str = "metadata") -> None:
    """Moves the sidecar captions of a folder into one table."""
    rows = []
    for caption in sorted(folder.rglob("*.txt")):
        image = caption.with_suffix(".png").relative_to(folder)
        rows.append({"file_name": str(image), "text": caption.read_text().strip()})
        caption.unlink()
    path = folder / f"{name}.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["metadata", "captions"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_every_caption_form_gives_the_same_samples(tmp_path: Path, form: str, name: str) -> None:
    sidecar = write_folder(tmp_path / "sidecar", 7)
    table = write_folder(tmp_path / "table", 7)
    write_table(table, form, name)
    packed(sidecar, tmp_path / "a")
    assert f"{name}.{form}" in packed(table, tmp_path / "b").caption_source
    a, b = in_index(tmp_path / "a"), in_index(tmp_path / "b")
    assert {key: sample[:2] for key, sample in a.items()} == {
        key: sample[:2] for key, sample in b.items()
    }


def test_rows_that_name_nothing_usable_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 3)
    for path in folder.rglob("*.txt"):
        path.unlink()
    (tmp_path / "secret.png").write_bytes(encoded(picture(0)))
    rows = [
        '{"file_name": "image_0001.png", "text": "good"}',
        '{"file_name": "image_0001.png", "text": "again"}',
        '{"file_name": "../secret.png", "text": "outside"}',
        '{"file_name": "/etc/passwd.png", "text": "outside"}',
        '{"file_name": "absent.png", "text": "x"}',
        '{"file_name": "image_0002.png", "text": null}',
        '{"text": "nameless"}',
        '{"file_name": "im',
        "[1]",
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    entries = list(captioned_files(find_captions(folder)))
    reasons = [entry.reason for entry in entries if isinstance(entry, BadSample)]
    captions = [entry.captions for entry in entries if isinstance(entry, CaptionedFile)]
    assert captions == [("good",)]
    for word in (
        "named again",
        "out of the folder",
        "no such file",
        "empty caption",
        "file_name is empty",
        "not JSON",
        "no JSON object",
        "not named in metadata.jsonl",
    ):
        assert any(word in reason for reason in reasons), word
    assert len(reasons) == 9


def test_all_damage_is_named_and_the_good_ones_are_kept(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 20)
    damage = write_damaged(source)
    result = packed(source, tmp_path / "out", max_bad_share=0.5)
    assert result.num_samples == 20
    assert len(result.bad) == len(damage)
    for name, word in damage.items():
        found = [bad for bad in result.bad if bad.key == name]
        assert found and word in found[0].reason, (name, result.bad)
    lines = (tmp_path / "out" / "index" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [bad.key for bad in result.bad]


def test_above_the_share_nothing_is_left(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 20)
    damage = write_damaged(source)
    with pytest.raises(UserError, match=f"{len(damage)} of 31 .*max_bad_share=0.01") as error:
        packed(source, tmp_path / "out")
    assert "zero.jpg: zero bytes" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = write_folder(tmp_path / "in", 3)
    monkeypatch.setattr("blackpoint.data.pack.pack_shard.ShardFile.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 3)
    (tmp_path / "out").mkdir()
    packed(source, tmp_path / "out")  # empty: taken
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(UserError, match="not empty"):
        packed(source, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(UserError, match="is a file"):
        packed(source, source / "image_0001.png")


def test_keys_survive_dots_and_twins(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    names = ["a.v1.png", "a.v2.png", "twin.png", "twin.jpg", "up.PNG", "odd.png", "odd.Jpg"]
    for number, name in enumerate(names):
        form = "JPEG" if name.lower().endswith("jpg") else "PNG"
        (source / name).write_bytes(encoded(picture(number), form))
        (source / name).with_suffix(".txt").write_text(name)
    (source / "up.json").write_text('{"made": "by hand"}')
    packed(source, tmp_path / "out")
    assert set(in_index(tmp_path / "out")) == {
        "a%2Ev1",
        "a%2Ev2",
        "twin%png",
        "twin%jpg",
        "up",
        "odd",
        "odd%Jpg",
    }
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert {"up.png", "up.txt", "up.json"} <= set(tar.getnames())


def test_user_mistakes_say_what_to_do(tmp_path: Path) -> None:
    def message(source: Path, **options: object) -> str:
        with pytest.raises(UserError) as error:
            packed(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "absent")
    assert "does not exist" in message(tmp_path / ("long" * 99))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no images (found nothing)" in message(empty)
    (empty / "photo.heic").write_bytes(b"x")
    assert "1 .heic" in message(empty)

    both = write_folder(tmp_path / "both", 3)
    (both / "metadata.jsonl").write_text('{"file_name": "image_0001.png", "text": "x"}\n')
    assert "metadata.jsonl and from 3 sidecar" in message(both)
    assert "captions=sidecar" in message(both)
    assert packed(both, tmp_path / "chosen", captions="sidecar").num_samples == 3
    (both / "metadata.jsonl").write_text('{"image": "image_0001.png", "text": "x"}\n')
    assert "has image, text" in message(both)
    (both / "metadata.jsonl").rename(both / "metadata.parquet")
    assert "cannot be read as Parquet" in message(both)

    bare = write_folder(tmp_path / "bare", 3)
    for path in bare.rglob("*.txt"):
        path.unlink()
    assert "no captions" in message(bare)
    with pytest.raises(UserError, match="max_bad_share=2"):
        PackConfig("a", "b", max_bad_share=2)


def test_foreign_shards_with_damage_are_indexed(tmp_path: Path) -> None:
    packed(write_folder(tmp_path / "in", 40), tmp_path / "out", samples_per_shard=20)
    (tmp_path / "shards").mkdir()
    for shard in (tmp_path / "out").glob("*.tar"):
        (tmp_path / "shards" / shard.name).write_bytes(shard.read_bytes())
    torn = tmp_path / "shards" / "shard-000001.tar"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    with tarfile.open(tmp_path / "shards" / "shard-000002.tar", "w") as tar:
        for name in ("image_0001.png", "image_0001.txt"):
            tar.add(tmp_path / "in" / name, name)
        tar.add(tmp_path / "in" / "image_0002.png", "captionless.png")
        tar.add(tmp_path / "in" / "image_0002.txt", "imageless.txt")
    broken = tmp_path / "shards" / "shard-000000.tar"
    content = bytearray(broken.read_bytes())
    record = Index(tmp_path / "out").records[15]
    content[record["image_offset"] - 500] ^= 0xFF  # in the header before the image
    broken.write_bytes(content)
    bad = build_index(tmp_path / "shards", max_bad_share=0.5)
    reasons = [sample.reason for sample in bad]
    assert sum("damaged tar" in reason for reason in reasons) == 2
    assert any("no caption" in reason for reason in reasons)
    assert any("no image" in reason for reason in reasons)
    whole = Index(tmp_path / "out").records[20:]["caption_offset"] + 512 <= torn.stat().st_size
    assert Index(tmp_path / "shards").num_samples == 19 + whole.sum() + 1
    with pytest.raises(UserError, match="max_bad_share"):
        (tmp_path / "shards" / "index" / "shards.json").unlink()
        build_index(tmp_path / "shards", max_bad_share=0.01)
    assert not leftovers(tmp_path / "shards")
