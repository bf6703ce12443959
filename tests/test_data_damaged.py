"""Laws of damaged data: never a crash or a hang, each loss named, the good ones all kept."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import MAX_IMAGE_PIXELS, decode
from blackpoint.data.index.index import Index, build_index
from blackpoint.data.index.scan import ShardScan, scan_shard
from blackpoint.data.module import CaptionedImages, DataConfig
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from tests.damaged_data import (
    BLOCK,
    DamagedShard,
    OddSample,
    damaged_shards,
    good_samples,
    odd_samples,
    write_tar,
)
from tests.tiny_run import make_tiny_shards

SEED = 20
ODD = odd_samples(SEED)
GOOD = good_samples(SEED + 1, 200)
SHARDS = damaged_shards(SEED + 2)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails what hangs."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def keys_of(scan: ShardScan) -> list[str]:
    keys, records = scan.records.keys, scan.records.records
    return [keys[row["key_offset"] :][: row["key_size"]].decode() for row in records]


def indexed(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Reads {shard:key: (image, caption)} by the offsets of the index alone."""
    index = Index(folder)
    found = {}
    for number, row in enumerate(index.records):
        name = index.shard_names[row["shard"]]
        content = (folder / name).read_bytes()
        image = content[row["image_offset"] :][: row["image_size"]]
        caption = content[row["caption_offset"] :][: row["caption_size"]]
        found[f"{name}:{index.key(number)}"] = (image, caption)
    return found


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All damaged shards, and sound ones that hold the good and the odd samples; no index."""
    folder = tmp_path_factory.mktemp("data") / "deep" / "shards"
    folder.mkdir(parents=True)
    for shard in SHARDS:
        (folder / shard.name).write_bytes(shard.content)
    samples = [sample for pair in zip(ODD, GOOD, strict=True) for sample in pair]
    write_tar(folder / "samples.tar", samples)
    return folder


def test_there_are_two_hundred_of_many_kinds() -> None:
    assert len(ODD) == 200 and sum(bool(sample.reason) for sample in ODD) > 100
    assert len({sample.key.split("_", 2)[2] for sample in ODD}) > 30
    assert odd_samples(SEED, 60) == ODD[:60]


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: shard.name)
def test_a_damaged_shard_loses_only_what_is_damaged(tmp_path: Path, shard: DamagedShard) -> None:
    path = tmp_path / shard.name
    path.write_bytes(shard.content)
    with within(20):
        scan = scan_shard(path, MAX_IMAGE_PIXELS)
    assert keys_of(scan) == shard.kept
    reasons = {(bad.key, bad.reason) for bad in scan.bad}
    assert len(scan.bad) == len(shard.bad), reasons
    for key, pattern in shard.bad:
        name = f"{shard.name}:{key}" if key else shard.name
        assert any(found == name and re.search(pattern, why) for found, why in reasons), reasons
    assert tree(tmp_path) == {shard.name}


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_cost_only_the_samples_they_are_in(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = good_samples(seed, 20)
    write_tar(tmp_path / "a.tar", samples)
    whole = scan_shard(tmp_path / "a.tar", MAX_IMAGE_PIXELS)
    starts = [int(row["image_offset"]) - BLOCK for row in whole.records.records]
    content = bytearray((tmp_path / "a.tar").read_bytes())
    places = rng.integers(0, len(content), 4)
    for place in places:
        content[place] ^= int(rng.integers(1, 256))
    (tmp_path / "a.tar").write_bytes(content)
    with within(20):
        scan = scan_shard(tmp_path / "a.tar", MAX_IMAGE_PIXELS)
    hit = {int(np.searchsorted(starts, place, side="right")) - 1 for place in places}
    untouched = [sample.key for number, sample in enumerate(samples) if number not in hit]
    assert set(untouched) <= set(keys_of(scan)) <= {sample.key for sample in samples}


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_tar_keeps_what_came_before(tmp_path: Path, seed: int) -> None:
    samples = good_samples(seed, 10)
    write_tar(tmp_path / "a.tar", samples)
    whole = scan_shard(tmp_path / "a.tar", MAX_IMAGE_PIXELS).records.records
    content = (tmp_path / "a.tar").read_bytes()
    length = int(np.random.default_rng(seed).integers(0, int(whole[-1]["caption_offset"])))
    (tmp_path / "a.tar").write_bytes(content[:length])
    ends = whole["caption_offset"] + whole["caption_size"]
    scan = scan_shard(tmp_path / "a.tar", MAX_IMAGE_PIXELS)
    assert keys_of(scan) == [s.key for s, end in zip(samples, ends, strict=True) if end <= length]
    assert any("damaged tar" in bad.reason for bad in scan.bad)


def test_check_names_every_loss_and_indexes_the_rest(shards: Path, tmp_path: Path) -> None:
    before = tree(shards.parents[1])
    with within(120):
        report = check(
            CheckConfig(str(shards), str(tmp_path / "out"), num_processes=1, max_bad_share=1)
        )
    kept = {f"{shard.name}:{key}" for shard in SHARDS for key in shard.kept}
    kept |= {f"samples.tar:{s.key}" for s in ODD + GOOD if not s.reason}
    bad = [(f"{s.name}:{key}" if key else s.name, why) for s in SHARDS for key, why in s.bad]
    bad += [(f"samples.tar:{sample.key}", sample.reason) for sample in ODD if sample.reason]
    assert report.num_samples == len(kept) and len(report.bad) == len(bad)
    assert sorted(sample.key for sample in report.bad) == sorted(key for key, _ in bad)
    reasons = [(sample.key, sample.reason) for sample in report.bad]
    for key, pattern in bad:
        assert any(key == name and re.search(pattern, why) for name, why in reasons), key
    lines = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == reasons
    assert report.index.state == "written"

    found = indexed(shards)
    assert set(found) == kept
    for sample in ODD + GOOD:
        if not sample.reason:
            assert found[f"samples.tar:{sample.key}"] == (sample.image, sample.caption)
    added = tree(shards.parents[1]) - before
    assert {name.split("/")[2] for name in added} == {"index"}  # nothing else, nowhere


def test_training_reads_all_that_is_kept_once_an_epoch(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        os.link(path, folder / path.name)
    config = DataConfig(
        str(folder), resolution=8, num_workers=0, max_bad_share=1, caption_dropout=0
    )
    images = CaptionedImages(config, seed=1, batch_size=1)
    with within(120):
        images.prepare_data()
        images.setup("fit")
        index = Index(folder)
        batches = iter(images.train_dataloader())
        seen = [next(batches) for _ in range(len(index))]
    assert all(not batch["replaced"] for batch in seen)
    assert sorted(batch["index"].item() for batch in seen) == list(range(len(index)))
    captions = {batch["key"][0]: batch["caption"][0] for batch in seen}
    for sample in ODD + GOOD:
        if not sample.reason:
            assert captions[sample.key] == sample.caption.decode("utf-8-sig").strip()
    assert captions["json_captions_000"] == "said 0"


def test_damage_after_indexing_is_replaced_and_named(tmp_path: Path) -> None:
    samples = good_samples(3, 30)
    write_tar(tmp_path / "a.tar", samples)
    os.utime(tmp_path / "a.tar", (1e9, 1e9))
    assert build_index(tmp_path) == []
    index, shard = Index(tmp_path), tmp_path / "a.tar"
    content = bytearray(shard.read_bytes())
    rows = index.records
    for number in (2, 9):
        start = int(rows[number]["image_offset"])
        content[start : start + 40] = bytes(40)
    content[int(rows[20]["caption_offset"])] = 0xFF
    shard.write_bytes(content)
    os.utime(shard, (1e9, 1e9))  # as after a fault of the disk: nobody has written it
    reader = Reader(Index(tmp_path), [shard], seed=0, resolution=8)
    batch = reader.batch(range(30))
    assert {number for number, _ in batch["replaced"]} == {2, 9, 20}
    assert not {2, 9, 20} & set(batch["index"].tolist())
    report = check(CheckConfig(str(tmp_path), num_processes=1))
    assert [bad.key for bad in report.bad] == [f"a.tar:good_{n:03d}" for n in (2, 9, 20)]
    state = report.index
    assert state.state == "stale" and "images have changed" in state.notes[0]
    assert "3 of its samples" in state.notes[1]

    shard.write_bytes(content[:-BLOCK])
    with pytest.raises(UserError, match="has changed since the index"):
        Reader(Index(tmp_path), find_shards(str(tmp_path)), seed=0, resolution=8)
    report = check(CheckConfig(str(tmp_path), num_processes=1))
    assert report.index.state == "stale" and "bytes when indexed" in report.index.notes[0]


def write_sources(folder: Path, samples: list[OddSample]) -> None:
    folder.mkdir()
    for sample in samples:
        (folder / f"{sample.key}.{sample.suffix}").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_bytes(sample.caption)


def test_pack_keeps_every_good_file_and_names_the_others(tmp_path: Path) -> None:
    write_sources(tmp_path / "in", ODD + GOOD)
    special = {"zero.jpg": "/dev/zero", "gone.jpg": "/absent", "loop.jpg": "loop.jpg"}
    for name, target in special.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    for name in (*special, "pipe.jpg"):
        (tmp_path / "in" / name).with_suffix(".txt").write_text("x")
    (tmp_path / "in" / "good_000.json").symlink_to("/dev/zero")
    with within(120):
        config = PackConfig(
            str(tmp_path / "in"), str(tmp_path / "out"), max_bad_share=1, num_processes=1
        )
        result = pack(config)
    bad = {f"{sample.key}.{sample.suffix}": sample.reason for sample in ODD if sample.reason}
    bad |= dict.fromkeys(special, "regular|read|no such") | {"pipe.jpg": "regular"}
    reasons = {sample.key: sample.reason for sample in result.bad}
    assert reasons.keys() == bad.keys() and len(reasons) == len(result.bad)
    for name, pattern in bad.items():
        assert re.search(pattern, reasons[name]), (name, reasons[name])
    found = {name.split(":")[1]: content for name, content in indexed(tmp_path / "out").items()}
    good = {sample.key: sample for sample in ODD + GOOD if not sample.reason}
    assert found.keys() == good.keys()
    for key, (image, caption) in found.items():
        assert image == good[key].image
        assert caption.decode() == good[key].caption.decode("utf-8-sig").strip()


def test_every_good_image_decodes_upright_rgb() -> None:
    for sample in ODD + GOOD:
        if not sample.reason:
            picture = decode(sample.image)
            assert picture.mode == "RGB" and min(picture.size) >= 1


def test_an_index_whose_keys_are_no_text_is_named_with_the_remedy(tmp_path: Path) -> None:
    keys = make_tiny_shards(tmp_path, 3) / "index" / "keys.bin"
    keys.write_bytes(b"\xff" * len(keys.read_bytes()))
    with pytest.raises(UserError, match=r"keys.bin: .* sample 1 is no UTF-8; remove its folder"):
        Index(tmp_path / "shards").key(1)
