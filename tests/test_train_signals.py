"""A signal never makes a crash: before training, during it, in a worker process, among tasks."""

import contextlib
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

import blackpoint.train.run
from blackpoint.data.files import signals
from blackpoint.data.files.errors import Resumable, Unreachable, UserError
from blackpoint.data.index.index import INDEX_FOLDER, has_index
from blackpoint.data.module import CaptionedImages
from blackpoint.scripts.cli import main
from blackpoint.train.callbacks.checkpoints import checkpoint_steps
from blackpoint.train.callbacks.interruption import lost_process
from blackpoint.train.callbacks.metrics import CsvMetrics, log_metrics
from blackpoint.train.cluster.cluster import cluster_environment, num_started
from blackpoint.train.records.metrics_file import read_metrics
from tests.tiny_run import tiny_config
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
TASK = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "blackpoint"}


STOPPED_IN_IMPORT = """
import os, runpy, sys

class Signal:
    number = int(sys.argv.pop(1))
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), self.number)

sys.meta_path.insert(0, Signal())
runpy.run_module("blackpoint.scripts.cli", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_during_the_imports_is_resumable_and_leaves_nothing(
    tmp_path: Path, number: int
) -> None:
    config = tiny_config(tmp_path / "run", tmp_path / "base", tmp_path / "shards")
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "tiny.yaml")
    arguments = [str(int(number)), "train", str(tmp_path / "tiny.yaml")]
    command = [sys.executable, "-c", STOPPED_IN_IMPORT, *arguments]
    process = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    error = process.stderr
    assert process.returncode == 75, error
    assert f"stopped by {signal.Signals(number).name}; the same command continues" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_signal_that_a_library_swallowed_stops_the_run_before_its_first_step(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals._flag, "received", "SIGTERM")
    with pytest.raises(Resumable, match="step 0 of 6, nothing to save"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards))
    assert not checkpoint_steps(tmp_path / "run" / "checkpoints")


def test_loader_workers_outlive_the_signals_that_slurm_sends_to_every_process(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **{"data.num_workers": 1})
    loader = CaptionedImages(config.data, 0, 4).train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    for _ in range(5):
        assert len(next(batches)["key"]) == 4
    assert worker.is_alive()
    with contextlib.suppress(RuntimeError):  # torch watches its workers, and may be first to say so
        worker.terminate()  # as the loader does, and Python at its end
        worker.join(PATIENCE_S)
    assert not worker.is_alive()


def test_a_task_of_srun_finds_the_others_through_slurm_and_does_not_requeue_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, tmp_path, tmp_path, **{"trainer.devices": 2})
    assert cluster_environment(config) is None
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    environment = cluster_environment(config)
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    with pytest.raises(UserError, match="--job-name=bash .* another name"):
        cluster_environment(config)


def test_tasks_that_are_not_the_processes_of_the_config_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    config = tiny_config(tmp_path, tmp_path, tmp_path, **{"trainer.devices": 4})
    with pytest.raises(UserError, match="trainer.devices=4 .* srun started 2 tasks"):
        cluster_environment(config)


def test_in_a_job_but_without_srun_processes_start_as_on_a_workstation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    assert isinstance(cluster_environment(config), LightningEnvironment)
    config.trainer.num_nodes = 2
    with pytest.raises(UserError, match="trainer.num_nodes=2 .* not started by srun"):
        cluster_environment(config)


@pytest.mark.parametrize(
    "message",
    [
        "Connection reset by peer",
        "[gloo/transport/tcp/pair.cc:545] Read error [10.77.0.2]:16603: No route to host. This is",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    ],
)
def test_a_server_that_hangs_up_is_not_taken_for_a_lost_process(message: str) -> None:
    """A crashed node resets nothing: its silence ends in an error of the wire, or of gloo's wait.

    The messages are those of torch 2.14's gloo, the second of a run whose node was cut off.
    """
    trainer: Any = types.SimpleNamespace(world_size=2, global_rank=1)
    with pytest.raises(Resumable, match="another process"), lost_process(trainer):
        raise RuntimeError(message)
    with pytest.raises(Unreachable), lost_process(trainer):
        raise Unreachable("0.tar: can't be read after 8 tries (Connection reset by peer)")


def test_processes_that_start_at_once_are_those_of_the_launcher_or_one_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, tmp_path, tmp_path, **{"trainer.devices": 2})
    assert num_started(config) == 1
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert num_started(config) == 1
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert num_started(config) == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert num_started(config) == 4
    for name in ("SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name)
    config.trainer.num_nodes = 3
    assert num_started(config) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_tasks_that_would_wait_for_an_index_are_told_how_to_make_it(
    rank: int, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns(INDEX_FOLDER))
    for name, value in (TASK | {"SLURM_NTASKS_PER_NODE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    options = {"trainer.devices": 2, "data.cache_dir": str(tmp_path / "a cache")}
    first = tmp_path / "shards" / "shard-{000000..000000}.tar"
    shutil.copyfile(tmp_path / "shards" / "shard-000000.tar", tmp_path / "shards" / "other.tar")
    config = tiny_config(tmp_path / "run", pipeline, first, **options)
    with pytest.raises(UserError, match="has no index, and 2 processes") as error:
        blackpoint.train.run.fit(config)
    assert not has_index(tmp_path / "shards") and not (tmp_path / "run").exists()
    program, *arguments = shlex.split(str(error.value).partition("make it first: ")[2])
    assert program == "blackpoint" and f"cache_dir={tmp_path / 'a cache'}" in arguments
    assert main(arguments) == 0
    CaptionedImages(config.data, 0, 4).require_index(2)


def test_a_tracker_that_fails_does_not_cost_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM's SIGTERM ends wandb's own process before the last step is logged."""

    class Gone(DummyLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionResetError("Connection lost")

    trainer = types.SimpleNamespace(
        loggers=[Gone(), CsvMetrics(tmp_path / "metrics.csv")], global_step=1
    )
    for _ in range(2):
        log_metrics(trainer, {"train/loss": 1.0})  # type: ignore[arg-type]
    assert len(read_metrics(tmp_path / "metrics.csv")["train/loss"]) == 2
    assert capsys.readouterr().err.count("Gone failed (ConnectionResetError") == 1
