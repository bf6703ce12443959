"""Laws of identity from afar: copies of shards and of indexes hold what the server's hold."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import blackpoint.data.shards.remote
from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.index.contents import DIGESTS_FILE, STAMPS_FILE
from blackpoint.data.index.index import INDEX_FOLDER, build_index
from blackpoint.data.module import CaptionedImages
from blackpoint.data.shards.listing import find_shards
from tests.damaged_data import OddSample, good_samples, write_tar
from tests.shard_server import ShardServer, serving

NAMES = ("a.tar", "b.tar")
OLD, NEW = "a photo of a cat", "a photo of a dog"


def write(folder: Path, caption: str, changed_s: float) -> None:
    """Writes the shards anew, in the same number of bytes, as they were at some time."""
    for seed, name in enumerate(NAMES):
        samples = [
            OddSample(sample.key, sample.suffix, sample.image, caption.encode(), "")
            for sample in good_samples(seed, 8)
        ]
        write_tar(folder / name, samples)
        os.utime(folder / name, (changed_s, changed_s))


def reindex(folder: Path) -> None:
    shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)
    build_index(folder)


def without_digests(folder: Path) -> None:
    for name in (DIGESTS_FILE, STAMPS_FILE):
        (folder / INDEX_FOLDER / name).unlink(missing_ok=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(blackpoint.data.shards.remote, "PAUSES_S", (0.01,) * 4)
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", OLD, 1e9)
    reindex(tmp_path / "set")
    with serving(tmp_path) as server:
        yield server


def module(server: ShardServer, **options: Any) -> CaptionedImages:
    settings = {"cache_dir": str(server.folder / "cache"), "num_workers": 0, "resolution": 16}
    url = f"{server.url}/set/{{a,b}}.tar"
    config = DataConfig(url, caption_dropout=0, **(settings | options))
    images = CaptionedImages(config, seed=3, batch_size=4)
    images.prepare_data()
    images.setup("fit")
    return images


def captions(images: CaptionedImages) -> set[str]:
    batches = itertools.islice(iter(images.train_dataloader()), 6)
    return {caption for batch in batches for caption in batch["caption"]}


def test_copies_of_what_was_indexed_anew_are_fetched_anew(server: ShardServer) -> None:
    assert captions(module(server)) == {OLD}
    write(server.folder / "set", NEW, 1e9 + 10)
    reindex(server.folder / "set")
    assert captions(module(server)) == {NEW}
    server.num_gets.clear()
    assert captions(module(server)) == {NEW}
    assert not server.num_gets["set/a.tar"]


@pytest.mark.parametrize("gigabytes", [1, 0])
def test_shards_that_changed_on_the_server_are_refused_by_name(
    server: ShardServer, gigabytes: float
) -> None:
    images = module(server, cache_gigabytes=gigabytes)
    assert captions(images) == {OLD}
    write(server.folder / "set", NEW, 1e9 + 10)
    with pytest.raises(
        UserError, match=r"set/a.tar has changed: other bytes .*1 more differ: .*b.tar"
    ):
        module(server, cache_gigabytes=gigabytes)
    # Without index, nor copies that would be read instead.
    with pytest.raises(UserError, match="[ab].tar has changed: other bytes"):
        captions(module(server, cache_dir=str(server.folder / "another")))


@pytest.mark.parametrize("gigabytes", [1, 0])
def test_another_version_of_the_same_bytes_is_accepted_once(
    server: ShardServer, gigabytes: float, capfd: pytest.CaptureFixture[str]
) -> None:
    assert captions(module(server, cache_gigabytes=gigabytes)) == {OLD}
    write(server.folder / "set", OLD, 1e9 + 10)
    capfd.readouterr()
    assert captions(module(server, cache_gigabytes=gigabytes)) == {OLD}
    assert "2 shards have another version on the server than before" in capfd.readouterr().err
    module(server, cache_gigabytes=gigabytes)
    assert "another version" not in capfd.readouterr().err


def test_an_unchanged_start_asks_once_a_shard_and_fetches_none(server: ShardServer) -> None:
    captions(module(server))
    server.num_gets.clear()
    server.num_asked.clear()
    captions(module(server))
    assert server.num_asked == {"set/a.tar": 1, "set/b.tar": 1}
    assert not any(name.endswith(".tar") for name in server.num_gets)


def test_a_copy_that_was_kept_by_its_size_is_compared_before_it_is_used(
    server: ShardServer, tmp_path: Path
) -> None:
    without_digests(server.folder / "set")
    captions(module(server))  # as before there were digests: kept by URL and size
    write(server.folder / "set", NEW, 1e9 + 10)
    reindex(server.folder / "set")
    assert captions(module(server)) == {NEW}


def test_a_kept_copy_of_the_right_bytes_is_not_fetched_again(server: ShardServer) -> None:
    without_digests(server.folder / "set")
    captions(module(server))
    reindex(server.folder / "set")
    server.num_gets.clear()
    assert captions(module(server)) == {OLD}
    assert not server.num_gets["set/a.tar"]


def test_an_index_that_differs_in_its_records_alone_is_fetched_again(server: ShardServer) -> None:
    def longer(caption: str, changed_s: float) -> None:
        write(server.folder / "set", caption, changed_s)
        reindex(server.folder / "set")
        without_digests(server.folder / "set")
        records = server.folder / "set" / INDEX_FOLDER / "records.npy"
        os.utime(records, (changed_s, changed_s))

    longer(OLD, 1e9)
    assert captions(module(server, cache_gigabytes=0)) == {OLD}
    longer(f"{OLD} on the sofa", 1e9 + 10)
    shutil.rmtree(server.folder / "cache" / "shards", ignore_errors=True)
    assert captions(module(server, cache_gigabytes=0)) == {f"{OLD} on the sofa"}


def test_without_digests_the_version_is_what_a_shard_is_known_by(
    server: ShardServer, capfd: pytest.CaptureFixture[str]
) -> None:
    without_digests(server.folder / "set")
    records = server.folder / "set" / INDEX_FOLDER / "records.npy"
    os.utime(records, (1e9, 1e9))
    module(server)
    assert "known by size and version until their index is written anew" in capfd.readouterr().err
    module(server)
    assert "known by size and version" not in capfd.readouterr().err
    write(server.folder / "set", NEW, 1e9 + 10)
    with pytest.raises(UserError, match="another version than before, and the index has no digest"):
        module(server)


def test_without_versions_what_is_fetched_is_still_compared(server: ShardServer) -> None:
    server.versions = False
    assert captions(module(server)) == {OLD}
    write(server.folder / "set", NEW, 1e9 + 10)
    assert captions(module(server)) == {OLD}  # the copies, which are what was indexed
    with pytest.raises(UserError, match="a.tar has changed: other bytes|b.tar has changed: other"):
        captions(module(server, cache_dir=str(server.folder / "another")))


def test_a_full_check_reads_the_server_and_not_the_copies(server: ShardServer) -> None:
    server.versions = False
    captions(module(server))
    options: dict[str, Any] = {"cache_dir": str(server.folder / "cache"), "num_processes": 1}
    url = f"{server.url}/set/{{a,b}}.tar"
    server.num_gets.clear()
    assert check(CheckConfig(url, **options)).index.state == "valid"
    assert not server.num_gets["set/a.tar"]
    assert check(CheckConfig(url, full=True, **options)).index.state == "valid"
    assert server.num_gets["set/a.tar"] == 1
    write(server.folder / "set", NEW, 1e9 + 10)
    with pytest.raises(UserError, match="a.tar has changed: other bytes"):
        check(CheckConfig(url, full=True, **options))


def test_shards_indexed_from_afar_are_known_by_content_too(server: ShardServer) -> None:
    shutil.rmtree(server.folder / "set" / INDEX_FOLDER)
    here = module(server).identity()
    build_index(server.folder / "set")
    local = DataConfig(str(server.folder / "set"), num_workers=0, resolution=16)
    images = CaptionedImages(local, seed=3, batch_size=4)
    images.prepare_data()
    images.setup("fit")
    assert images.identity() == here
    assert len(find_shards(str(server.folder / "set"))) == len(NAMES)
