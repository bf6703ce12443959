"""Laws of `data encode` over processes: the same bytes by any number, with and without locks."""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import blackpoint.data.work.partial
import blackpoint.train.encode.encode
import blackpoint.train.encode.shards
from blackpoint.data.files.errors import UserError
from blackpoint.data.index.index import IndexWriter
from blackpoint.data.latents import Encoding
from blackpoint.data.shards.shard_file import ShardFile
from blackpoint.data.work.partial import Partial
from blackpoint.sampling.runtime.tasks import Task, this_task
from blackpoint.train.encode.encode import EncodeConfig, EncodeResult
from blackpoint.train.encode.tasks import process_devices
from tests.interleaved import killed_at, other_process_at
from tests.tiny_encode import arguments, encoded, nothing_beside, stop_after, tree
from tests.waiting import PATIENCE_S, names_in, wait_for
from tests.warm_verb import WarmVerb

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unbroken(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in four shards, by one process."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    encoded(shards, pipeline, output)
    return output


def _one_at_a_time(load: Any, lock: Any) -> Any:
    def alone(*arguments: Any) -> Any:
        with lock:
            return load(*arguments)

    return alone


@pytest.fixture
def as_tasks(monkeypatch: pytest.MonkeyPatch):
    """Runs a function as two tasks at once, in threads of this process; returns what came out."""
    loading = threading.Lock()  # the libraries load models in one thread at a time
    for module, name in (
        (blackpoint.train.encode.encode, "planned_encoding"),
        (blackpoint.train.encode.shards, "_encoder"),
    ):
        monkeypatch.setattr(module, name, _one_at_a_time(getattr(module, name), loading))

    def task() -> Task:
        rank = int(threading.current_thread().name.rpartition("_")[2])
        return Task(rank, 2, rank)

    monkeypatch.setattr(blackpoint.train.encode.encode, "this_task", task)
    monkeypatch.setattr(blackpoint.train.encode.shards, "LOOK_EVERY_S", 0.01)

    def run(function: Any) -> list[Any]:
        with ThreadPoolExecutor(2, "task") as threads:
            started = threading.Barrier(2)
            futures = [threads.submit(lambda: (started.wait(), function())[1]) for _ in range(2)]
        return [future.exception() or future.result() for future in futures]

    return run


def test_two_tasks_share_the_work_and_write_the_same_bytes(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path, as_tasks, monkeypatch
) -> None:
    makers: dict[int, str] = {}
    make, both_work = blackpoint.train.encode.shards._make, threading.Barrier(2, timeout=PATIENCE_S)

    def noted(rules: Any, number: int, *arguments: Any) -> None:
        assert number not in makers
        is_first = threading.current_thread().name not in makers.values()
        makers[number] = threading.current_thread().name
        if is_first:
            both_work.wait()
        make(rules, number, *arguments)

    monkeypatch.setattr(blackpoint.train.encode.shards, "_make", noted)
    results = as_tasks(lambda: encoded(shards, pipeline, tmp_path / "out"))
    assert [(found.num_samples, found.num_shards) for found in results] == [(12, 4)] * 2
    assert sorted(makers) == [0, 1, 2, 3, 4]  # each once; 4 is the empty caption
    assert len(set(makers.values())) == 2
    assert tree(tmp_path / "out") == tree(unbroken)
    assert nothing_beside(tmp_path / "out")


def test_a_task_that_dies_is_stood_in_for(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path, as_tasks, monkeypatch
) -> None:
    stop_after(monkeypatch, 4, KeyboardInterrupt())
    results = as_tasks(lambda: encoded(shards, pipeline, tmp_path / "out"))
    assert sorted(type(found).__name__ for found in results) == [
        "EncodeResult",
        "KeyboardInterrupt",
    ]
    assert tree(tmp_path / "out") == tree(unbroken)
    assert nothing_beside(tmp_path / "out")


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every file system one that knows no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


def test_without_locks_the_bytes_are_the_same(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path, as_tasks, no_locks, capsys
) -> None:
    results = as_tasks(lambda: encoded(shards, pipeline, tmp_path / "out"))
    assert [found.num_samples for found in results] == [12, 12]
    assert "can't be locked (No locks available)" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(unbroken)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (blackpoint.train.encode.encode, "compared_source"),
        (blackpoint.train.encode.encode, "refuse_used_output"),
        (Partial, "_join"),
        (Partial, "_check_settings"),
        (
            blackpoint.data.work.partial,
            "write_whole",
        ),  # of the settings, when the folders are there
        (blackpoint.train.encode.shards, "write_part"),
        (blackpoint.train.encode.encode, "read_part"),
        (blackpoint.train.encode.encode, "shard_content_of"),
        (IndexWriter, "append"),
        (IndexWriter, "close"),
        (blackpoint.train.encode.encode, "read_empty"),
        (Encoding, "write"),
        (os, "fsync"),
        (Partial, "__exit__"),
    ],
)
def test_without_locks_another_task_may_finish_at_any_point(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path, no_locks, owner: Any, name: str
) -> None:
    def encode_all() -> EncodeResult:
        return encoded(shards, pipeline, tmp_path / "out")

    if name == "_check_settings":
        with killed_at(Partial, "claim"):
            encode_all()
    with other_process_at(owner, name, encode_all):
        assert encode_all().num_samples == 12
    assert tree(tmp_path / "out") == tree(unbroken)
    assert nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("name", ["append", "close"])
def test_a_task_that_is_killed_at_the_index_leaves_no_trace(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path, no_locks, name: str
) -> None:
    with killed_at(IndexWriter, name):
        encoded(shards, pipeline, tmp_path / "out")
    assert encoded(shards, pipeline, tmp_path / "out").num_kept_shards == 4
    assert tree(tmp_path / "out") == tree(unbroken)
    assert nothing_beside(tmp_path / "out")


def test_another_command_does_not_join(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    with Partial(tmp_path / "out", {}, shared=True):
        encoded(shards, pipeline, tmp_path / "elsewhere")
        with pytest.raises(UserError, match="another process is at work there with"):
            encoded(shards, pipeline, tmp_path / "out")
        assert (tmp_path / ".out.partial").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_task_that_comes_late_finds_the_output(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(shards, pipeline, tmp_path / "out")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr(Partial, "__enter__", None)
    late = encoded(shards, pipeline, tmp_path / "out")
    assert (first.num_kept_shards, late.num_kept_shards) == (0, 4)
    assert late.num_samples == first.num_samples


def test_tasks_do_not_all_index_the_source(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(shards, tmp_path / "source")
    shutil.rmtree(source / "index")
    monkeypatch.setattr(blackpoint.train.encode.encode, "this_task", lambda: Task(1, 2, 1))
    with pytest.raises(UserError, match="no index.*blackpoint data check shards="):
        encoded(source, pipeline, tmp_path / "out")
    assert not (source / "index").exists()


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({}, Task(0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Task(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, Task(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "SLURM_PROCID": "0"}, Task(3, 4, 3)),
        ({"SLURM_NTASKS": "8"}, Task(0, 1, 0)),  # a shell in an allocation
        ({"RANK": "x", "WORLD_SIZE": "4"}, Task(0, 1, 0)),
    ],
)
def test_tasks_are_told_by_their_launcher(variables: dict[str, str], task: Task) -> None:
    assert this_task(variables) == task


def test_processes_share_gpus_out_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(task: Task, **options: Any) -> list[str]:
        return process_devices(EncodeConfig("s", "c", "o", **options), task)

    monkeypatch.setattr("blackpoint.train.encode.tasks.usable_cores", lambda: 3)
    assert devices(Task(), device="cpu") == ["cpu"] * 3
    assert devices(Task(1, 2, 1), device="cpu") == ["cpu"]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert devices(Task(1, 2, 1), device="cpu") == ["cpu"] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices(Task()) == [f"cuda:{number}" for number in range(4)]
    assert devices(Task(), num_processes=6)[4:] == ["cuda:0", "cuda:1"]
    assert devices(Task(6, 8, 2)) == ["cuda:2"]


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path
) -> None:
    given = arguments(shards, pipeline, tmp_path / "out", num_processes=2, num_workers=1)
    run = [sys.executable, "-m", "blackpoint.scripts.cli", *given]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and "encoded 12 samples in 4 shards" in found.stdout, found.stderr
    assert tree(tmp_path / "out") == tree(unbroken)
    assert nothing_beside(tmp_path / "out")


def at_first_sample(marker: Path, parts: Path | None) -> None:
    """Holds this task up in its first shard until the other is at work too.

    With `parts` it is the one that is preempted, when the other has finished a shard.
    """
    write = ShardFile.write

    def hold_up(self: ShardFile, *arguments: Any) -> Any:
        ShardFile.write = write  # type: ignore[method-assign]
        if parts is None:
            wait_for(marker.exists)
        else:
            marker.touch()
            wait_for(lambda: names_in(parts))
            os.kill(os.getpid(), signal.SIGUSR1)
        return write(self, *arguments)

    ShardFile.write = hold_up  # type: ignore[method-assign]


@pytest.mark.slow
def test_tasks_of_slurm_meet_and_a_preempted_one_can_be_resumed(
    pipeline: Path, shards: Path, unbroken: Path, tmp_path: Path
) -> None:
    """As srun starts them; one is preempted in its first shard, the other ends the work."""
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    output, parts = tmp_path / "made" / "out", tmp_path / "made" / ".out.partial" / "parts"
    tasks = [
        WarmVerb(
            *arguments(shards, pipeline, output),
            environment=dict(zip(names, (str(rank), "2", str(rank)), strict=True)),
            before=functools.partial(at_first_sample, tmp_path / "marker", parts if rank else None),
        )
        for rank in range(2)
    ]
    errors = [task.communicate()[1] for task in tasks]
    assert tasks[0].returncode == 0, errors[0]
    assert tasks[1].returncode == 75 and "the same command continues" in errors[1], errors[1]
    assert tree(output) == tree(unbroken)
    assert nothing_beside(output)
