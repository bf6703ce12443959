"""Laws of `data pack` over processes and time: the same bytes however it was run or stopped."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import webdataset

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.index.contents import STAMPS_FILE
from blackpoint.data.index.index import Index, IndexWriter
from blackpoint.data.pack.captions import CaptionedFile
from blackpoint.data.pack.fingerprints import Fingerprints
from blackpoint.data.pack.pack import PackConfig, PackResult, pack
from blackpoint.data.pack.pack_shard import ShardFile
from blackpoint.data.pack.shard_list import read_list, shard_lists
from blackpoint.data.shards.shard_file import member_bytes
from blackpoint.data.work.partial import Partial
from blackpoint.data.work.workers import run_in_processes
from tests.data_images import encoded, picture, write_damaged, write_folder
from tests.interleaved import killed_at
from tests.interrupted_verb import interrupted
from tests.worker_jobs import die_at_three, double, fail_at_three

ROOT = Path(__file__).resolve().parents[1]


def packed(source: Path, output: Path, **options: object) -> PackResult:
    settings: dict[str, object] = {"samples_per_shard": 4, "num_processes": 1, **options}
    return pack(PackConfig(str(source), str(output), **settings))  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != STAMPS_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def arguments(source: Path, output: Path, *settings: str) -> list[str]:
    given = [f"source={source}", f"output={output}", "samples_per_shard=4"]
    return ["data", "pack", *given, *settings]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Makes the disk (or whatever raises) fail at the n-th sample that is written."""

    def install(num_samples: int, error: BaseException) -> None:
        write, num_written = ShardFile.write, 0

        def failing(self: ShardFile, *arguments):
            nonlocal num_written
            num_written += 1
            if num_written > num_samples:
                raise error
            return write(self, *arguments)

        monkeypatch.setattr(ShardFile, "write", failing)

    yield install


def test_one_and_three_processes_write_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 30)
    write_damaged(source)
    for number in range(6):  # a whole shard of nothing usable
        (source / f"c{number}.png").write_bytes(b"")
        (source / f"c{number}.txt").write_text("x")
    results = [
        packed(source, tmp_path / f"{num}", num_processes=num, max_bad_share=0.6) for num in (1, 3)
    ]
    assert results[0].bad == results[1].bad
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    assert results[0].num_samples == 30
    names = Index(tmp_path / "1").shard_names
    assert names == [f"shard-{number:06d}.tar" for number in range(len(names))]
    assert set(names) == {path.name for path in (tmp_path / "1").glob("*.tar")}


def test_a_shard_is_what_tarfile_would_write(tmp_path: Path) -> None:
    sample = {"png": encoded(picture(0)), "txt": b"x" * 512}
    keys = ["a", "b" * 96, "c" * 97, "d\u00e9" * 100, "e/f"]
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.GNU_FORMAT) as theirs:
        for name, content in ((f"{key}.{name}", sample[name]) for key in keys for name in sample):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o444
            member.uname = member.gname = "bigdata"
            theirs.addfile(member, BytesIO(content))
    ours = ShardFile(tmp_path / "ours.tar")
    for key in keys:
        before = ours.offset
        ours.write(key, sample)
        predicted = [member_bytes(f"{key}.{name}", len(sample[name])) for name in sample]
        assert sum(predicted) == ours.offset - before
    ours.close()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert (tmp_path / "ours.tar").stat().st_size == ours.num_bytes
    found = list(webdataset.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == keys


def test_shards_are_full_at_their_size(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 12)
    packed(source, tmp_path / "out", samples_per_shard=100, shard_megabytes=0.008)
    sizes = Index(tmp_path / "out").shard_samples.values()
    assert len(sizes) > 2 and len({len(samples) for samples in list(sizes)[:-1]}) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stopped_pack_is_continued(
    tmp_path: Path, stop_after, monkeypatch, capsys, error: BaseException
) -> None:
    source = write_folder(tmp_path / "in", 14)
    packed(source, tmp_path / "unbroken")
    stop_after(9, error)
    with pytest.raises(type(error)):
        packed(source, tmp_path / "out")
    assert "2 finished shards are kept in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    shards = list((tmp_path / ".out.partial" / "shards").glob("*.tar"))
    identities = {path.name: path.stat().st_ino for path in shards}
    assert sorted(identities) == ["shard-000000.tar", "shard-000001.tar"]
    assert not list((tmp_path / ".out.partial").glob("working*"))
    monkeypatch.undo()
    result = packed(source, tmp_path / "out", num_processes=2, max_bad_share=0.5)
    assert "found 2 finished shards" in capsys.readouterr().err
    assert (result.num_kept_shards, result.num_shards, result.num_read) == (2, 4, 6)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")
    for name, inode in identities.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode
    assert not (tmp_path / ".out.partial").exists()


def test_what_changed_meanwhile_is_packed_anew(tmp_path: Path, stop_after, monkeypatch) -> None:
    source = write_folder(tmp_path / "in", 14)
    stop_after(9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "out")
    monkeypatch.undo()
    (source / "image_0001.png").write_bytes(encoded(picture(77)))
    assert packed(source, tmp_path / "out").num_kept_shards == 1
    packed(source, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_damaged_part_or_shard_is_packed_anew(tmp_path: Path, stop_after, monkeypatch) -> None:
    source = write_folder(tmp_path / "in", 14)
    stop_after(12, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "out")
    monkeypatch.undo()
    part, other = sorted((tmp_path / ".out.partial" / "parts").iterdir())[:2]
    part.write_bytes(part.read_bytes()[:-3])
    (tmp_path / ".out.partial" / "shards" / "shard-000001.tar").write_bytes(b"torn")
    (tmp_path / ".out.partial" / "shards" / ".index.partial-7").mkdir()
    (tmp_path / ".out.partial" / "working-dead").mkdir()
    assert packed(source, tmp_path / "out").num_kept_shards == 1
    packed(source, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_other_settings_are_refused_where_shards_are_kept(tmp_path: Path, stop_after) -> None:
    source = write_folder(tmp_path / "in", 14)
    stop_after(9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        packed(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"samples_per_shard=4 \(now 5\).*remove that folder"):
        packed(source, tmp_path / "out", samples_per_shard=5)
    (tmp_path / ".out.partial" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="remove that folder"):
        packed(source, tmp_path / "out")
    assert len(list((tmp_path / ".out.partial" / "parts").iterdir())) == 2


def test_two_packs_do_not_meet(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 5)
    with Partial(tmp_path / "out", {}):
        with pytest.raises(UserError, match=f'packing there .*"process": {os.getpid()}'):
            packed(source, tmp_path / "out")
        assert (tmp_path / ".out.partial").exists()
    assert not (tmp_path / ".out.partial").exists()
    assert packed(source, tmp_path / "out").num_samples == 5


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_that_is_a_link_is_filled_where_it_leads(tmp_path: Path, is_there: bool) -> None:
    source = write_folder(tmp_path / "in", 5)
    disk, link = tmp_path / "disk", tmp_path / "out"
    link.symlink_to(disk / "shards")
    (disk / "shards" if is_there else disk).mkdir(parents=True)
    assert packed(source, link).num_samples == 5
    assert link.is_symlink() and len(Index(disk / "shards")) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"in", "disk", "out"}


def test_without_locks_it_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert packed(write_folder(tmp_path / "in", 5), tmp_path / "out").num_samples == 5
    assert "can't be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["append", "close"])
def test_a_pack_that_is_killed_at_the_index_leaves_no_trace(tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path / "in", 5)
    packed(source, tmp_path / "unbroken")
    with killed_at(IndexWriter, name):
        packed(source, tmp_path / "out")
    assert not list((tmp_path / ".out.partial" / "shards").glob("*index*"))
    assert packed(source, tmp_path / "out").num_kept_shards == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")
    assert not (tmp_path / ".out.partial").exists()


def test_what_a_kill_left_beside_a_whole_pack_goes_at_the_next_start(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 5)
    with killed_at(Partial, "__exit__"):
        packed(source, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "parts").exists()
    with pytest.raises(UserError, match="is not empty"):
        packed(source, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists() and (tmp_path / "out").exists()


@pytest.mark.parametrize(("num_written", "kept"), [(2, 0), (9, 2)])
def test_a_full_disk_says_what_to_do(
    tmp_path: Path, stop_after, monkeypatch, num_written: int, kept: int
) -> None:
    source = write_folder(tmp_path / "in", 14)
    stop_after(num_written, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunFailed, match="No space left on device.*make room") as error:
        packed(source, tmp_path / "out")
    assert ("2 shards (0.0 MB) were finished" in str(error.value)) == bool(kept)
    assert ("nothing is left behind" in str(error.value)) == (not kept)
    assert (tmp_path / ".out.partial").exists() == bool(kept)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert packed(source, tmp_path / "out").num_kept_shards == kept


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 40, (96, 64))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        given = arguments(source, disk / "out", "num_processes=2")
        run = [sys.executable, "-m", "blackpoint.scripts.cli", *given]
        full = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        assert full.returncode == 1 and "No space left on device" in full.stderr, full.stderr
        assert "Traceback" not in full.stderr and not (disk / "out").exists()
        subprocess.run([*mount[:4], "remount,size=4m", *mount[5:]], check=True)
        again = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == 0 and "kept" in again.stdout, again.stderr
        packed(source, tmp_path / "fresh")
        assert tree(disk / "out") == tree(tmp_path / "fresh")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path, how: int) -> None:
    source, output = write_folder(tmp_path / "in", 60), tmp_path / "out"
    packed(source, tmp_path / "unbroken")
    rng, counts = random.Random(int(how)), []
    for _ in range(3):
        counts.append(rng.randrange(10, 30))
        given = arguments(source, output, "num_processes=2")
        found = interrupted(how, counts[-1], tmp_path / ".out.partial", given)
        assert "Traceback" not in found.stderr, found.stderr
        # -how: it came when the handlers were not there yet, or no longer.
        assert found.returncode in ({2: 130, 15: 143, 9: -9}[how], -how), (counts, found.stderr)
        assert not output.exists()
    packed(source, output)
    assert tree(output) == tree(tmp_path / "unbroken")
    assert not (tmp_path / ".out.partial").exists()


def test_workers_do_each_job_once_and_end() -> None:
    counts: list[int] = []
    assert sorted(run_in_processes(double, range(9), 2, counts.append)) == list(range(0, 18, 2))
    assert sum(counts) == 9
    with pytest.raises(RuntimeError, match="LookupError: job three"):
        list(run_in_processes(fail_at_three, range(9), 2, counts.append))
    with pytest.raises(RunFailed, match="ended by signal 9 .*memory runs out"):
        list(run_in_processes(die_at_three, range(9), 2, counts.append))


def test_ctrl_c_reaches_no_worker_also_not_the_first() -> None:
    code = (
        "from blackpoint.data.work.workers import run_in_processes\n"
        "from tests.worker_jobs import blocked_signals\n"
        "print([{2, 15} <= s for s in run_in_processes(blocked_signals, range(3), 2, print)])"
    )
    found = subprocess.run(  # a process of its own: it has not started Python's tracker yet
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[True, True, True]"


def test_a_killed_worker_leaves_a_pack_that_continues(tmp_path: Path, monkeypatch) -> None:
    source = write_folder(tmp_path / "in", 14)
    with monkeypatch.context() as patch:

        def killed(*arguments: object):
            yield from list(run_in_processes(*arguments))[:2]  # type: ignore[arg-type]
            raise RunFailed("a worker process was ended by signal 9")

        patch.setattr("blackpoint.data.pack.pack.run_in_processes", killed)
        with pytest.raises(RunFailed, match="signal 9; 4 shards.*run the same command again"):
            packed(source, tmp_path / "out")
    assert packed(source, tmp_path / "out").num_kept_shards == 4


def test_workers_import_neither_torch_nor_webdataset() -> None:
    code = (
        "import sys, blackpoint.data.pack.pack; "
        "print({'torch', 'webdataset', 'lightning'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


def test_lists_come_back_as_they_were(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"12345")
    good = CaptionedFile("k", "shown", tmp_path / name, ("a \u00e9\ncaption",))
    bad = BadSample("b", "why")
    lists = list(shard_lists([bad, good, bad, good], tmp_path, tmp_path, 1, 1e9))
    assert [listed.num_entries for listed in lists] == [3, 1]
    entries = list(read_list(lists[0].path))
    assert entries[0] == entries[2] == bad
    # A pack that an earlier version was stopped in is known by the digest of such lines.
    line = lists[0].path.read_text().splitlines()[1]
    changed_ns = (tmp_path / name).stat().st_mtime_ns
    assert json.loads(line) == ["k", "shown", name, good.captions[0], 5, changed_ns, None]
    assert (entries[1].path, entries[1].captions, entries[1].size) == (name, good.captions, 5)  # type: ignore[union-attr]


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", 4)
    os.mkfifo(source / "pipe.png")
    (source / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        (source / f"{name}.txt").write_text("x")
    shutil.copy(source / "image_0001.png", source / "silent.png")
    os.mkfifo(source / "silent.txt")
    result = packed(source, tmp_path / "out", max_bad_share=0.9)
    assert result.num_samples == 4
    assert {bad.key for bad in result.bad} == {"pipe.png", "endless.png", "silent.png"}
    assert {bad.reason for bad in result.bad} == {"not a regular file"}


def test_fingerprints_know_every_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blackpoint.data.pack.fingerprints.NUM_RECENT", 64)
    names, total = Fingerprints(), 1_000
    assert all(names.add(f"{number}.png") for number in range(total))
    assert not any(names.add(f"{number}.png") for number in range(0, total, 7))
    assert "0.png" in names and f"{total - 1}.png" in names and "absent.png" not in names


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_files(tmp_path: Path) -> None:
    peak_mb = {}
    for num_images in (1_000, 10_000):
        source = tmp_path / f"in{num_images}"
        content = encoded(picture(0, (4, 4)))
        for number in range(num_images):
            path = source / f"{number // 1000:03d}" / f"{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.with_suffix(".txt").write_text(f"a caption of some forty letters {number:06d}")
        code = (
            "import resource, sys\nfrom blackpoint.data.pack.pack import PackConfig, pack\n"
            "pack(PackConfig(sys.argv[1], sys.argv[2], samples_per_shard=500, num_processes=1))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        output = str(tmp_path / f"out{num_images}")
        run = [sys.executable, "-c", code, str(source), output]
        found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        peak_mb[num_images] = int(found.stdout) / 1024
    print(peak_mb)
    assert peak_mb[10_000] - peak_mb[1_000] < 4, peak_mb
