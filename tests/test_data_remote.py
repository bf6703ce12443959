"""Laws of what is fetched: byte for byte what the server has, or nothing; within bounds."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import blackpoint.data.shards.remote
from blackpoint.data.files.errors import RunFailed, Unreachable, UserError
from blackpoint.data.files.lock import locked
from blackpoint.data.shards.remote import Changed, TooLarge, fetch, read_range
from blackpoint.data.shards.shard_cache import RemoteShard, ShardCache
from blackpoint.data.shards.shard_digest import file_digest
from tests.shard_server import (
    ShardServer,
    answers,
    cut_short,
    drops_after,
    serving,
    stalls_after,
)
from tests.waiting import PATIENCE_S, wait_for

SIZE = 3_000_000


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    """Serves six shards of noise, 3 MB each; pauses are short."""
    monkeypatch.setattr(blackpoint.data.shards.remote, "PAUSES_S", (0.01,) * 4)
    (tmp_path / "served").mkdir()
    for number in range(6):
        content = np.random.default_rng(number).bytes(SIZE)
        (tmp_path / "served" / f"{number}.tar").write_bytes(content)
    with serving(tmp_path / "served") as server:
        yield server


def served(server: ShardServer, number: int = 0) -> bytes:
    return (server.folder / f"{number}.tar").read_bytes()


def cached(cache: ShardCache, server: ShardServer, number: int) -> bytes:
    descriptor = cache.open(RemoteShard(f"{number}.tar", f"{server.url}/{number}.tar", SIZE))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def files(folder: Path) -> set[str]:
    beside = {"lock", "copy.json"}
    return {path.name for path in folder.rglob("*") if path.is_file() and path.name not in beside}


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.tar"))


def test_a_download_outlives_what_a_server_does(server: ShardServer, tmp_path: Path) -> None:
    server.faults = [
        answers(503),
        drops_after(1_000_000),
        drops_after(700_000),
        answers(500),
        answers(429),
        cut_short(300_000),
        drops_after(0),
    ]
    assert fetch(f"{server.url}/0.tar", tmp_path / "a", SIZE).num_bytes == SIZE
    assert (tmp_path / "a").read_bytes() == served(server)
    assert not server.faults
    # It went on where it stopped, but for what a break loses on the way.
    starts = [int(wanted.split("=")[1].rstrip("-")) for wanted in server.ranges]
    assert starts == sorted(starts) and 0 < starts[0] < starts[1] < starts[-1] <= 2_000_000


def test_without_ranges_a_download_begins_anew(server: ShardServer, tmp_path: Path) -> None:
    server.serves_ranges = False
    server.faults = [drops_after(1_000_000), cut_short(2_999_999)]
    fetch(f"{server.url}/0.tar", tmp_path / "a", SIZE)
    assert (tmp_path / "a").read_bytes() == served(server) and not server.ranges


def test_a_file_that_changes_meanwhile_is_not_mixed(server: ShardServer, tmp_path: Path) -> None:
    new = np.random.default_rng(99).bytes(SIZE + 5)

    def changes(handler, part) -> bool:
        drops_after(1_000_000)(handler, part)
        (server.folder / "0.tar").write_bytes(new)
        return True

    server.faults = [changes]
    assert fetch(f"{server.url}/0.tar", tmp_path / "a").num_bytes == SIZE + 5
    assert (tmp_path / "a").read_bytes() == new
    with pytest.raises(Changed):
        fetch(f"{server.url}/0.tar", tmp_path / "a", SIZE)
    with pytest.raises(TooLarge):
        fetch(f"{server.url}/0.tar", tmp_path / "a", None, SIZE)


def test_a_stall_is_a_dropped_connection(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blackpoint.data.shards.remote, "STALL_S", 2.0)
    released = threading.Event()
    server.faults = [stalls_after(1_000_000, released)]
    fetch(f"{server.url}/0.tar", tmp_path / "a", SIZE)
    released.set()
    assert (tmp_path / "a").read_bytes() == served(server)


def test_what_does_not_pass_names_the_url_and_the_remedy(
    server: ShardServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = ShardCache(tmp_path / "cache", 10**9, "data.cache_gigabytes")
    server.faults = [drops_after(1000)] + [answers(503)] * 4
    with pytest.raises(Unreachable, match=r"0.tar: .*5 tries.*status 503.*same command again"):
        cached(cache, server, 0)
    assert capfd.readouterr().err.count("trying again in") == 4
    assert files(tmp_path / "cache") == set() and not server.faults
    assert cached(cache, server, 0) == served(server)
    server.faults = [answers(403)]
    with pytest.raises(UserError, match="1.tar: can't be read .HTTP status 403.*credentials"):
        cached(cache, server, 1)
    with pytest.raises(FileNotFoundError):
        fetch(f"{server.url}/absent.tar", tmp_path / "a")
    secret = f"{server.url.replace('//', '//user:secret@')}/1.tar?token=secret"
    server.faults = [answers(403)]
    with pytest.raises(UserError) as error:
        fetch(secret, tmp_path / "a")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="no such kind of URL"):
        fetch("nowhere://x/a.tar", tmp_path / "a")
    with pytest.raises(UserError, match=r"s3:// needs a package .* pip install -e '\.\[remo"):
        fetch("s3://bucket/a.tar", tmp_path / "a")


def test_a_member_is_read_by_a_range(server: ShardServer) -> None:
    server.faults = [answers(503), cut_short(10), drops_after(10)]
    found = read_range(f"{server.url}/0.tar", 1_000_000, 50_000)
    assert found == served(server)[1_000_000:1_050_000]
    assert set(server.ranges) == {"bytes=1000000-1049999"}


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_an_object_store_gives_the_same_bytes(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(blackpoint.data.shards.remote, "PAUSES_S", (0.01,) * 4)
    content = np.random.default_rng(0).bytes(SIZE)
    url = f"memory://{tmp_path.name}/0.tar" if protocol == "memory" else f"file://{tmp_path}/0.tar"
    with fsspec.open(url, "wb") as file:
        file.write(content)
    cache = ShardCache(tmp_path / "cache", 10**9, "data.cache_gigabytes")
    with os.fdopen(cache.open(RemoteShard("0.tar", url, SIZE)), "rb") as file:
        assert file.read() == content
    assert read_range(url, 10, 1000) == content[10:1010]


def test_the_shards_stay_within_the_bound(server: ShardServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE, "data.cache_gigabytes")
    held = cache.open(RemoteShard("0.tar", f"{server.url}/0.tar", SIZE))
    for number in (1, 2, 0, 3):
        assert cached(cache, server, number) == served(server, number)
        assert total_bytes(cache.folder) <= 3 * SIZE
    # 1 was not read for the longest time, though 0 was fetched before it.
    assert files(cache.folder) == {"0.tar", "2.tar", "3.tar"}
    for number in (4, 5, 1):
        cached(cache, server, number)
    assert files(cache.folder) == {"1.tar", "4.tar", "5.tar"}
    with os.fdopen(held, "rb") as file:  # removed meanwhile, and still read to its end
        assert file.read() == served(server, 0)
    small = ShardCache(tmp_path / "small", SIZE - 1, "data.cache_gigabytes")
    with pytest.raises(UserError, match="data.cache_gigabytes=0.003: .*0.tar alone has 0.003 GB"):
        cached(small, server, 0)
    assert files(tmp_path / "small") == set()


def test_earlier_versions_of_a_shard_make_room_for_it(server: ShardServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE - 1, "data.cache_gigabytes")
    for content in (b"a" * SIZE, b"b" * SIZE):
        (server.folder / "0.tar").write_bytes(content)
        whole = file_digest(server.folder / "0.tar")
        os.close(cache.open(RemoteShard("0.tar", f"{server.url}/0.tar", SIZE, whole)))
    assert total_bytes(cache.folder) == SIZE


def test_a_shard_that_is_held_stays(server: ShardServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, "data.cache_gigabytes")
    with cache.held(RemoteShard("0.tar", f"{server.url}/0.tar")) as path:
        for number in (1, 2, 3):
            cached(cache, server, number)
        assert path.read_bytes() == served(server, 0)
    # Without a size of its own, the server's word decides whether what is here is still right.
    (server.folder / "0.tar").write_bytes(b"new")
    with cache.held(RemoteShard("0.tar", f"{server.url}/0.tar")) as path:
        assert path.read_bytes() == b"new"


def read_some(url: str, folder: Path, seed: int, results) -> None:
    """Reads shards in its own order through a small cache and compares them with the originals."""
    cache = ShardCache(folder / "cache", 3 * SIZE, "data.cache_gigabytes")
    wrong = 0
    for number in np.random.default_rng(seed).integers(0, 6, 12):
        descriptor = cache.open(RemoteShard(f"{number}.tar", f"{url}/{number}.tar", SIZE))
        with os.fdopen(descriptor, "rb") as file:
            wrong += file.read() != (folder / "served" / f"{number}.tar").read_bytes()
    results.put((wrong, total_bytes(cache.folder)))


def test_processes_share_a_cache(server: ShardServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=read_some, args=(server.url, tmp_path, seed, results))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=PATIENCE_S) for _ in processes]
    for process in processes:
        process.join()
    assert [wrong for wrong, _ in found] == [0] * 4
    assert max(size for _, size in found) <= 3 * SIZE
    assert not [name for name in files(tmp_path / "cache") if name.endswith(".partial")]
    # No shard was ever fetched by two at a time.
    assert max(server.most_at_once.values()) == 1


def test_a_large_enough_cache_fetches_each_shard_once(server: ShardServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cache = ShardCache(tmp_path / "cache", 10**9, "data.cache_gigabytes")
    processes = [
        context.Process(
            target=lambda: results.put(
                [cached(cache, server, n) == served(server, n) for n in range(6)]
            )
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=PATIENCE_S) for _ in processes] == [[True] * 6] * 3
    for process in processes:
        process.join()
    assert set(server.num_gets.values()) == {1}


def test_a_kill_during_a_download_does_no_damage(server: ShardServer, tmp_path: Path) -> None:
    released = threading.Event()
    server.faults = [stalls_after(2_000_000, released)]
    code = (
        "import sys; from pathlib import Path\n"
        "from blackpoint.data.shards.shard_cache import RemoteShard, ShardCache\n"
        "shard = RemoteShard('0.tar', sys.argv[2], 3000000)\n"
        "ShardCache(Path(sys.argv[1]), 10**9, 'x').open(shard)"
    )
    cache = ShardCache(tmp_path / "cache", 10**9, "data.cache_gigabytes")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(cache.folder), f"{server.url}/0.tar"]
    )
    wait_for(
        lambda: sum(path.stat().st_size for path in cache.folder.rglob("*.partial")),
        lambda: process.poll() is None,
    )
    assert not list(cache.folder.rglob("*.tar"))
    with pytest.raises(BlockingIOError), locked(next(cache.folder.glob("*/lock")), wait=False):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    released.set()
    # Another shard's arrival removes what the killed process left behind.
    cached(cache, server, 1)
    assert files(cache.folder) == {"1.tar"}
    assert cached(cache, server, 0) == served(server)


def test_a_full_disk_says_so_and_leaves_nothing(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path / "cache", 10**9, "data.cache_gigabytes")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left.*lower data.cache_gigabytes.*same command"):
        cached(cache, server, 0)
    assert files(cache.folder) == set()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder.*data.cache_dir="):
        cached(ShardCache(tmp_path / "file" / "x", 10**9, "data.cache_gigabytes"), server, 0)
