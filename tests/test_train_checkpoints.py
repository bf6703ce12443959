"""Laws of what a run leaves on disk: whole or refused, the best kept, one process."""

import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import blackpoint.train.run
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.checkpoints.resolve import last_checkpoint
from blackpoint.train.callbacks import checkpoints
from blackpoint.train.callbacks.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_steps,
    damage,
    read_best,
)
from blackpoint.train.config.config import TrainConfig
from tests.interrupted_verb import interrupt_at_change
from tests.tiny_run import Killed, assert_same_run, kill, stop_in_step, tiny_config
from tests.warm_verb import WarmVerb

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports have their own tests."""
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


@pytest.fixture(scope="module")
def unbroken(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        blackpoint.train.run.fit(every_two(run_dir, pipeline, shards))
    return run_dir


def every_two(run_dir: Path, pipeline: Path, shards: Path, **overrides: object) -> TrainConfig:
    values = {"trainer.checkpoint_every_steps": 2, "trainer.validate_every_steps": 0}
    return tiny_config(run_dir, pipeline, shards, **(values | overrides))


def stop_at(step: int, config: TrainConfig) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, step, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    return Path(config.run_dir)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [truncate, flip_a_byte, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    spoil, unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path, capsys
) -> None:
    config = every_two(tmp_path / "run", pipeline, shards)
    run_dir = stop_at(5, config)
    assert list(checkpoint_steps(run_dir / "checkpoints")) == [2, 4]
    spoil(run_dir / "checkpoints/step_00000004.ckpt")
    assert blackpoint.train.run.fit(config) == 0
    told = capsys.readouterr().err
    assert "WARNING" in told and "step_00000004.ckpt is damaged" in told
    assert "going on from step 2" in told
    assert_same_run(run_dir, unbroken)
    assert list(checkpoint_steps(run_dir / "checkpoints")) == [4, 6]


def test_damage_of_the_last_step_is_mended_too(
    unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = every_two(tmp_path / "run", pipeline, shards)
    blackpoint.train.run.fit(config)
    (tmp_path / "run/export").rmdir()
    truncate(tmp_path / "run/checkpoints/step_00000006.ckpt")
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_a_run_of_damaged_checkpoints_only_says_what_to_remove(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = every_two(tmp_path / "run", pipeline, shards)
    run_dir = stop_at(5, config)
    for path in checkpoint_steps(run_dir / "checkpoints").values():
        truncate(path)
    with pytest.raises(UserError, match="every checkpoint is damaged .*remove .*checkpoints"):
        blackpoint.train.run.fit(config)


def test_a_whole_checkpoint_shows_no_damage(unbroken: Path, tmp_path: Path) -> None:
    for path in checkpoint_steps(unbroken / "checkpoints").values():
        assert damage(path) is None
    assert damage(tmp_path / "absent.ckpt")


def test_no_flipped_byte_of_the_table_of_contents_stops_the_check(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.ckpt"
    torch.save({"a": torch.zeros(2)}, path)
    whole = path.read_bytes()
    told = set()
    for position in range(whole.index(b"PK\x01\x02"), len(whole)):
        for bits in (0x01, 0x80):
            content = bytearray(whole)
            content[position] ^= bits
            path.write_bytes(content)
            told.add(damage(path))
    assert any("encrypted" in reason for reason in told if reason)
    assert any("codec can't decode" in reason for reason in told if reason)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_a_checkpoint_that_cannot_be_written_keeps_the_one_before(
    error: int, unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    config = every_two(tmp_path / "run", pipeline, shards)
    save, fails = torch.save, [False, True]

    def failing(checkpoint, file):
        if fails.pop(0):
            file.write(b"PK")
            raise OSError(error, os.strerror(error))
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(RunFailed, match=f"{os.strerror(error)}; step 2 is kept.*same command"):
            blackpoint.train.run.fit(config)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [
        "step_00000002.ckpt"
    ]
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_a_disk_that_is_really_full(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        with pytest.raises(RunFailed, match="No space left on device") as caught:
            blackpoint.train.run.fit(every_two(disk / "run", pipeline, shards))
        assert "same command continues" in str(caught.value)
        assert not list((disk / "run").rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_best_checkpoint_is_kept_and_named(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    losses = {1: 0.5, 2: 0.2, 3: 0.4, 4: 0.3, 5: 0.9, 6: 0.8}
    monkeypatch.setattr(
        "blackpoint.train.callbacks.validation.ValidationLoss.measure",
        lambda self, trainer, module: {"validation/loss": losses[trainer.global_step]},
    )
    settings = {
        "data.validation_shards": str(shards),
        "trainer.validate_every_steps": 1,
        "trainer.checkpoint_every_steps": 1,
        "trainer.keep_checkpoints": 1,
    }
    config = tiny_config(tmp_path / "run", pipeline, shards, **settings)
    run_dir = stop_at(4, config)
    assert list(checkpoint_steps(run_dir / "checkpoints")) == [2, 4]
    blackpoint.train.run.fit(config)
    assert list(checkpoint_steps(run_dir / "checkpoints")) == [2, 6]
    assert json.loads((run_dir / "checkpoints/best.json").read_text()) == {
        "step": 2,
        "validation_loss": 0.2,
    }
    without = tiny_config(
        tmp_path / "without", pipeline, shards, **settings, **{"trainer.keep_best": False}
    )
    blackpoint.train.run.fit(without)
    assert list(checkpoint_steps(tmp_path / "without/checkpoints")) == [6]


@pytest.mark.parametrize("moment", ["write_whole", "remove_old"])
def test_a_kill_beside_the_last_save_loses_no_best_and_leaves_nothing_over(
    moment: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    """Where the best is noted, or before older ones go: no later start measures that step."""
    monkeypatch.setattr(
        "blackpoint.train.callbacks.validation.ValidationLoss.measure",
        lambda self, trainer, module: {"validation/loss": 1.0 / trainer.global_step},
    )
    settings = {"data.validation_shards": str(shards), "trainer.validate_every_steps": 2}
    settings |= {"trainer.keep_checkpoints": 1}
    config = every_two(tmp_path / "run", pipeline, shards, **settings)
    with monkeypatch.context() as patch:
        function = getattr(checkpoints, moment)
        calls = iter([function, function, lambda *_: kill()])
        patch.setattr(checkpoints, moment, lambda *given: next(calls)(*given))
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".best.json.0.tmp").touch()
    assert blackpoint.train.run.fit(config) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["best.json", "step_00000006.ckpt"]
    assert read_best(folder) == (6, 1 / 6)


def test_a_lost_best_is_found_again(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    (tmp_path / "best.json").write_text("{")
    assert read_best(tmp_path) is None


def test_the_newest_checkpoint_is_that_of_most_steps_whatever_the_clock(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step, changed_s in ((900, 1_000), (1000, 500), (99_999, 10), (100_000_000, 5)):
        path = tmp_path / f"checkpoints/step_{step:08d}.ckpt"
        path.write_bytes(b"")
        os.utime(path, (changed_s, changed_s))
    newest = last_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step_100000000.ckpt"


def test_a_run_directory_has_one_process(
    unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = every_two(tmp_path / "run", pipeline, shards)
    run_dir = stop_at(3, config)
    with (run_dir / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='in use by another process.*"host".*another run_dir'):
            blackpoint.train.run.fit(config)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(run_dir, unbroken)


def test_two_starts_at_once_do_not_share_a_new_directory(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    config = every_two(tmp_path / "run", pipeline, shards)
    files = []

    def other_was_faster(config: TrainConfig) -> str:
        run_dir = Path(config.run_dir)
        run_dir.mkdir()
        files.append((run_dir / ".lock").open("a"))
        fcntl.flock(files[0], fcntl.LOCK_EX)
        return ""

    prepare = blackpoint.train.run.CaptionedImages.setup
    monkeypatch.setattr(
        blackpoint.train.run.CaptionedImages,
        "setup",
        lambda self, stage: (other_was_faster(config), prepare(self, stage))[1],
    )
    with pytest.raises(UserError, match="in use by another process"):
        blackpoint.train.run.fit(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    files[0].close()


def test_a_file_system_without_locks_is_used_and_said(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert blackpoint.train.run.fit(every_two(tmp_path / "run", pipeline, shards)) == 0
    assert "can't be locked (No locks available)" in capsys.readouterr().err


def without_export_but(function: Callable[..., None], *arguments: Any) -> None:
    """Prepares a process of its own: exports have their own tests there too."""
    blackpoint.train.run.export = lambda source, output, weights: output.mkdir()  # type: ignore[assignment]
    function(*arguments)


@pytest.mark.slow
def test_killed_at_any_change_of_its_folder_it_ends_with_the_same_bits(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """SIGKILL, before each of the changes that a start and a checkpoint make, and between."""
    settings = {
        "trainer.max_steps": 20,
        "trainer.checkpoint_every_steps": 2,
        "trainer.validate_every_steps": 4,
        "data.validation_shards": str(shards),
    }
    unbroken = tiny_config(tmp_path / "unbroken", pipeline, shards, **settings)
    blackpoint.train.run.fit(unbroken)
    config = tiny_config(tmp_path / "run", pipeline, shards, **settings)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    folder, num_kills, torn = tmp_path / "run", 0, 0
    for count in [*range(1, 25), *range(25, 80, 2)]:
        with tempfile.NamedTemporaryFile() as counter:
            kill_at = (signal.SIGKILL, count, counter.name, str(folder))
            before = functools.partial(without_export_but, interrupt_at_change, *kill_at)
            process = WarmVerb("train", str(yaml), before=before)
            _, error = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        num_kills += 1
        torn += bool(list(folder.glob("checkpoints/.*.tmp")))
    assert process.returncode == 0 and num_kills > 10
    assert torn, "no kill came within the writing of a checkpoint"
    assert_same_run(tmp_path / "run", tmp_path / "unbroken", step=20)
    assert not list(folder.glob("checkpoints/.*.tmp"))


def test_an_older_torch_error_names_the_systems_reason(tmp_path: Path, monkeypatch) -> None:
    def failing(checkpoint, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0") from None

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(RunFailed, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "step_00000001.ckpt")
    assert not list(tmp_path.iterdir())
