"""Laws of `data encode` over time: the same bytes however it was stopped."""

import errno
import json
import random
import shutil
import signal
from pathlib import Path

import pytest

import blackpoint.train.encode.encode
import blackpoint.train.encode.shards
from blackpoint.data.files.errors import RunFailed, UserError
from tests.interrupted_verb import interrupted
from tests.tiny_encode import arguments, encoded, nothing_beside, stop_after, tree
from tests.tiny_pipeline import make_tiny_pipeline


@pytest.fixture(scope="module")
def unbroken(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in four shards, by one process."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    encoded(shards, pipeline, output)
    return output


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stopped_encoding_is_continued(
    pipeline: Path,
    shards: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
    error: BaseException,
) -> None:
    stop_after(monkeypatch, 8, error)
    with pytest.raises(type(error)):
        encoded(shards, pipeline, tmp_path / "out")
    assert "2 finished shards are kept in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    assert not (partial / "working").exists()
    inodes = {path.name: path.stat().st_ino for path in (partial / "shards").glob("*.tar")}
    assert sorted(inodes) == ["shard-000000.tar", "shard-000001.tar"]
    monkeypatch.undo()
    result = encoded(shards, pipeline, tmp_path / "out", num_workers=2)
    assert "found 2 finished shards" in capsys.readouterr().err
    assert (result.num_kept_shards, result.num_shards) == (2, 4)
    assert tree(tmp_path / "out") == tree(unbroken)
    for name, inode in inodes.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode
    assert nothing_beside(tmp_path / "out")


def test_what_a_kill_left_beside_a_whole_encoding_goes_at_the_next_start(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path
) -> None:
    encoded(shards, pipeline, tmp_path / "out")
    (tmp_path / ".out.partial" / "parts").mkdir(parents=True)
    encoded(shards, pipeline, tmp_path / "out")
    assert nothing_beside(tmp_path / "out") and tree(tmp_path / "out") == tree(unbroken)


def test_damaged_shards_are_encoded_anew(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path, monkeypatch
) -> None:
    stop_after(monkeypatch, 11, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoded(shards, pipeline, tmp_path / "out")
    monkeypatch.undo()
    partial = tmp_path / ".out.partial"
    part = partial / "parts" / "000000.part"
    part.write_bytes(part.read_bytes()[:-3])
    (partial / "shards" / "shard-000001.tar").write_bytes(b"torn")
    (partial / "shards" / "empty.safetensors").unlink()
    (partial / "shards" / ".index.partial-7").mkdir()
    (partial / "working" / "dead").mkdir(parents=True)
    assert encoded(shards, pipeline, tmp_path / "out").num_kept_shards == 1
    assert tree(tmp_path / "out") == tree(unbroken)


def test_another_command_is_refused_where_shards_are_kept(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    stop_after(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoded(shards, pipeline, tmp_path / "out")
    monkeypatch.undo()
    other = shutil.copytree(pipeline, tmp_path / "other")
    shutil.rmtree(other / "vae")
    shutil.copytree(make_tiny_pipeline(tmp_path / "seed1", seed=1) / "vae", other / "vae")
    for checkpoint, options, message in (
        (other, {}, r"vae=\w{32} \(now \w{32}\)"),
        (pipeline, {"dtype": "float32"}, r"dtype=float16 \(now float32\)"),
        (pipeline, {"resolution": 32}, r"resolution=16 \(now 32\)"),
        (pipeline, {"batch_size": 4}, r"batch_size=2 \(now 4\)"),
    ):
        with pytest.raises(UserError, match=f"{message}.*remove that folder to begin anew"):
            encoded(shards, checkpoint, tmp_path / "out", **options)
    moved = shutil.copytree(shards, tmp_path / "elsewhere")
    assert encoded(moved, pipeline, tmp_path / "out").num_kept_shards == 2


@pytest.mark.parametrize(("num_written", "kept"), [(2, 0), (8, 2)])
def test_a_full_disk_says_what_to_do(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch,
    num_written: int,
    kept: int,
) -> None:
    stop_after(monkeypatch, num_written, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunFailed, match="No space left on device.*make room") as error:
        encoded(shards, pipeline, tmp_path / "out")
    assert ("2 shards (0.0 MB) were finished" in str(error.value)) == bool(kept)
    assert ("nothing was kept" in str(error.value)) == (not kept)
    assert (tmp_path / ".out.partial").exists() == bool(kept)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert encoded(shards, pipeline, tmp_path / "out").num_kept_shards == kept


def test_an_encoding_that_was_changed_is_refused(unbroken: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "changed")
    path = folder / "encoding.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": "0" * 32}))
    with pytest.raises(UserError, match=r"have the key \w{12}, but .* with the key \w{12}"):
        blackpoint.train.encode.encode.Encoding.read(folder)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """Each way of ending it in turn, at some change of the folder, until it has come to its end."""
    options = {"samples_per_shard": 1, "batch_size": 1, "num_workers": 1}
    encoded(shards, pipeline, tmp_path / "unbroken", **options)
    output, partial = tmp_path / "made" / "out", tmp_path / "made" / ".out.partial"
    output.parent.mkdir()
    rng = random.Random(0)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        options["num_processes"] = 2 if how in (signal.SIGKILL, signal.SIGTERM) else 1
        given, alone = arguments(shards, pipeline, output, **options), options["num_processes"] == 1
        found = interrupted(how, rng.randrange(10, 30), partial, given, is_warm=alone)
        assert "Traceback" not in found.stderr, found.stderr
        # -how: it came when the handlers were not there yet, or no longer.
        status = {signal.SIGINT: 130, signal.SIGKILL: -9}.get(how, 75)
        assert found.returncode in (status, -how), found.stderr
        assert not output.exists()
    encoded(shards, pipeline, output, **options)
    assert tree(output) == tree(tmp_path / "unbroken")
    assert nothing_beside(output)
