"""Laws of identity: shards are known by what they hold, and by their place at no time."""

import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blackpoint.data.index.index
from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.identity import differences
from blackpoint.data.index.contents import DIGESTS_FILE, STAMPS_FILE
from blackpoint.data.index.index import INDEX_FOLDER, Index, build_index
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from blackpoint.data.shards.shard_digest import shard_content, text_content
from blackpoint.scripts.measurements.measure_identity import IdentityCostConfig, markdown, measure
from tests.damaged_data import OddSample, good_samples, write_tar
from tests.data_images import write_folder

LONG_AGO = (1e9, 1e9)
OLD, NEW = "a photo of a cat", "a photo of a cat on the sofa"


def captioned(caption: str, seed: int = 7, num_samples: int = 20) -> list[OddSample]:
    return [
        OddSample(sample.key, sample.suffix, sample.image, caption.encode(), "")
        for sample in good_samples(seed, num_samples)
    ]


def write(folder: Path, caption: str, seed: int = 7, name: str = "a.tar") -> Path:
    """Writes a shard as if it had been written long ago."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / name, captioned(caption, seed))
    os.utime(folder / name, LONG_AGO)
    return folder / name


def module(folder: Path, **options: Any) -> CaptionedImages:
    settings = {"num_workers": 0, "resolution": 16, "cache_dir": str(folder.parent / "cache")}
    images = CaptionedImages(DataConfig(str(folder), **(settings | options)), seed=3, batch_size=4)
    images.prepare_data()
    images.setup("fit")
    return images


def captions(images: CaptionedImages) -> set[str]:
    return {caption for caption in next(iter(images.train_dataloader()))["caption"] if caption}


def checked(folder: Path, **options: Any) -> tuple[str, str]:
    cache = str(folder.parent / "cache")
    found = check(CheckConfig(str(folder), num_processes=1, cache_dir=cache, **options)).index
    return found.state, " ".join(found.notes)


@pytest.fixture
def text_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the shards whose headers and captions are read to compare them."""
    names: list[str] = []

    def counted(path: Path, rows: np.ndarray) -> Any:
        names.append(path.name)
        return text_content(path, rows)

    monkeypatch.setattr(blackpoint.data.index.index, "text_content", counted)
    return names


def as_before_digests(folder: Path) -> None:
    """Leaves of an index what was written before there were digests."""
    for name in (DIGESTS_FILE, STAMPS_FILE):
        (folder / INDEX_FOLDER / name).unlink(missing_ok=True)


@pytest.mark.parametrize("caption", [NEW, "a photo of a dog"])
def test_captions_that_were_rewritten_are_refused_by_name(tmp_path: Path, caption: str) -> None:
    shard = write(tmp_path / "in", OLD)
    write(tmp_path / "in", OLD, 8, "b.tar")
    build_index(tmp_path / "in")
    size = shard.stat().st_size
    write_tar(shard, captioned(caption))
    assert shard.stat().st_size == size, "tar padding takes up what was added"
    with pytest.raises(UserError, match="a.tar has changed since the index .*remove that folder"):
        Reader(Index(tmp_path / "in"), [shard], seed=0, resolution=8)
    with pytest.raises(UserError, match="a.tar has changed since"):
        module(tmp_path / "in")
    state, notes = checked(tmp_path / "in")
    assert state == "stale" and "a.tar: its headers, captions or images have changed" in notes
    assert "b.tar" not in notes
    shutil.rmtree(tmp_path / "in" / INDEX_FOLDER)
    assert captions(module(tmp_path / "in")) == {OLD, caption}


def test_what_only_moved_is_accepted_and_known_the_next_time(
    tmp_path: Path, text_reads: list[str]
) -> None:
    write(tmp_path / "in", OLD)
    build_index(tmp_path / "in")
    before = module(tmp_path / "in").identity()
    assert not text_reads
    os.utime(tmp_path / "in" / "a.tar", (1e9 + 5, 1e9 + 5))
    for expected in (["a.tar"], ["a.tar"]):  # read once; the second start finds the new time
        module(tmp_path / "in")
        assert text_reads == expected
    shutil.copytree(tmp_path / "in", tmp_path / "there", copy_function=shutil.copyfile)
    os.utime(tmp_path / "there" / "a.tar", (1e9 + 9, 1e9 + 9))
    assert captions(module(tmp_path / "there")) == {OLD}
    assert text_reads == ["a.tar"] * 2
    assert not differences(before, module(tmp_path / "there").identity())
    assert checked(tmp_path / "there") == ("valid", "")


def test_where_the_index_can_not_be_written_the_cache_remembers(
    tmp_path: Path, text_reads: list[str]
) -> None:
    write(tmp_path / "in", OLD)
    build_index(tmp_path / "in")
    stamps = tmp_path / "in" / INDEX_FOLDER / STAMPS_FILE
    stamps.unlink()
    stamps.mkdir()  # nothing can take its name
    for _ in range(3):
        module(tmp_path / "in")
    assert text_reads == ["a.tar"]
    assert len(list((tmp_path / "cache").rglob(STAMPS_FILE))) == 1


def test_other_images_of_the_same_size_are_found_by_a_check(tmp_path: Path) -> None:
    samples = captioned(OLD)
    write(tmp_path / "in", OLD)
    build_index(tmp_path / "in")
    content = bytearray((tmp_path / "in" / "a.tar").read_bytes())
    record = Index(tmp_path / "in").record(3)
    content[int(record["image_offset"]) + int(record["image_size"]) - 1] ^= 1
    (tmp_path / "in" / "a.tar").write_bytes(content)
    assert len(samples) == len(module(tmp_path / "in").readers().popitem()[1])
    for options in ({}, {"full": True}):
        state, notes = checked(tmp_path / "in", **options)
        assert state == "stale" and "a.tar: its images have changed" in notes


def test_a_file_that_changes_within_the_resolution_of_the_clock_is_read_again(
    tmp_path: Path, text_reads: list[str]
) -> None:
    shard = write(tmp_path / "in", OLD)
    os.utime(shard)
    build_index(tmp_path / "in")
    now = shard.stat()
    write_tar(shard, captioned("a photo of a dog"))
    os.utime(shard, ns=(now.st_atime_ns, now.st_mtime_ns))  # as a coarse clock would have it
    with pytest.raises(UserError, match="a.tar has changed since"):
        module(tmp_path / "in")


def test_an_index_without_digests_is_adopted_once_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", OLD)
    build_index(tmp_path / "in")
    expected = Index(tmp_path / "in").digests
    luminance = np.array(Index(tmp_path / "in").records["luminance"])
    as_before_digests(tmp_path / "in")
    assert captions(module(tmp_path / "in")) == {OLD}
    assert "had no digests of its shards: 1 shards" in capfd.readouterr().err
    module(tmp_path / "in")
    assert "digests" not in capfd.readouterr().err
    assert Index(tmp_path / "in").digests == expected
    assert np.array_equal(Index(tmp_path / "in").records["luminance"], luminance)
    as_before_digests(tmp_path / "in")
    state, notes = checked(tmp_path / "in")
    assert state == "valid" and "had no digests of 1 shards" in notes
    assert Index(tmp_path / "in").digests == expected
    write_tar(tmp_path / "in" / "a.tar", captioned("a photo of a dog"))
    with pytest.raises(UserError, match="a.tar has changed since"):
        module(tmp_path / "in")


def test_an_index_without_digests_does_not_serve_captions_of_other_lengths(tmp_path: Path) -> None:
    shard = write(tmp_path / "in", OLD)
    build_index(tmp_path / "in")
    as_before_digests(tmp_path / "in")
    write_tar(shard, captioned(NEW))
    state, notes = checked(tmp_path / "in")
    assert state == "stale" and "a.tar: its captions or images are not where they were" in notes
    with pytest.raises(UserError, match="a.tar has changed since"):
        module(tmp_path / "in")


def test_who_writes_the_index_does_not_matter(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 25)
    pack(PackConfig(str(tmp_path / "images"), str(tmp_path / "packed"), samples_per_shard=8))
    packed = Index(tmp_path / "packed").digests
    for path in (tmp_path / "packed").glob("*.tar"):
        whole = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        assert packed[path.name].whole == whole
    for number, make in enumerate((build_index, checked)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in find_shards(str(tmp_path / "packed")):
            shutil.copy(path, folder)
        make(folder)
        assert Index(folder).digests == packed
        as_before_digests(folder)
        module(folder)
        assert Index(folder).digests == packed


def test_threads_that_open_an_index_together_read_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, OLD)
    build_index(tmp_path)
    expected, index = Index(tmp_path).rows("a.tar"), Index(tmp_path)
    read_magic, others = np.lib.format.read_magic, list[np.ndarray]()

    def beside_another(file: BinaryIO) -> tuple[int, int]:
        monkeypatch.setattr(np.lib.format, "read_magic", read_magic)
        thread = threading.Thread(target=lambda: others.append(index.rows("a.tar")))
        thread.start()
        thread.join()
        return read_magic(file)

    monkeypatch.setattr(np.lib.format, "read_magic", beside_another)
    assert np.array_equal(index.rows("a.tar"), expected)
    assert np.array_equal(others[0], expected)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    write(folder, OLD)
    build_index(folder)
    return folder / "a.tar"


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_every_bit_counts_and_those_of_images_not_as_text(
    shard: Path, place: float, bit: int
) -> None:
    content = bytearray(shard.read_bytes())
    rows, position = Index(shard.parent).rows("a.tar"), int(place * len(content))
    before = shard_content(shard, rows)
    content[position] ^= 1 << bit
    changed = shard.with_name("changed")
    changed.write_bytes(content)
    after, text = shard_content(changed, rows), text_content(changed, rows)
    starts = rows["image_offset"].astype(int)
    in_image = bool(((starts <= position) & (position < starts + rows["image_size"])).any())
    assert after.whole != before.whole and text.text == after.text
    assert (after.text == before.text) is in_image


def test_the_cost_of_identity_is_measured_by_a_command(tmp_path: Path) -> None:
    config = IdentityCostConfig(3, 1e-3, 1, image_side_px=16, repeats=1, folder=str(tmp_path))
    found = measure(config)
    assert all(seconds > 0 for seconds in found["start"].values())
    assert all(row["memory"] > 0 for row in found["gigabyte"]["seconds"].values())
    assert "compare headers and captions" in markdown(found)
    assert not list(tmp_path.iterdir())


def test_an_unchanged_start_reads_no_shard(tmp_path: Path, text_reads: list[str]) -> None:
    folder = tmp_path / "in"
    shard = write(folder, OLD, name="000.tar")
    for number in range(1, 200):
        shutil.copy2(shard, folder / f"{number:03d}.tar")
    build_index(folder)
    module(folder)
    assert not text_reads
