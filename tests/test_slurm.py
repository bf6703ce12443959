"""Jobs on a real SLURM of two emulated nodes: however they are broken, they end as if never broken.

Trainings compare with one unbroken run of two processes, bit by bit: the order of the sums is the
same wherever the two processes are.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from blackpoint.data.files.paths import CODE_ROOT
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.cluster.frozen import CODE
from blackpoint.scripts.cluster.requeue import STOPPED, read_starts
from blackpoint.scripts.config import load
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.encode.encode import encode
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.records.run_directory import newest_step
from tests.slurm_cluster import MARKS, Cluster, wait_until
from tests.tiny_encode import tree
from tests.tiny_run import make_tiny_shards, tiny_config
from tests.waiting import names_in

pytestmark = MARKS
NUM_STEPS = 40
NUM_ENCODED = 300
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
ONE_TASK = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
TIMEOUT_S = 1200


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def checkout(tmp_path: Path, pipeline: Path, shards: Path) -> Path:
    return make_checkout(tmp_path / "checkout", pipeline, shards)


@pytest.fixture(scope="module")
def unbroken(
    cluster: Cluster, pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run directory of a job of two tasks on one node that nothing disturbed."""
    folder = make_checkout(tmp_path_factory.mktemp("unbroken") / "checkout", pipeline, shards)
    job = submit(cluster, folder, *TWO_TASKS)
    assert_done(cluster, job, folder, restarts=0)
    return folder / "runs" / f"tiny-{job}"


def make_checkout(folder: Path, pipeline: Path, shards: Path) -> Path:
    """Copies the code to where it may be edited, and writes a config there."""
    for package in CODE:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CODE_ROOT / package, folder / package, ignore=ignored)
    (folder / "base").symlink_to(pipeline)
    (folder / ".venv").symlink_to(sys.prefix)
    values = {"trainer.max_steps": NUM_STEPS, "trainer.checkpoint_every_steps": 10}
    config = tiny_config(Path("elsewhere"), Path("base"), shards, **values)
    OmegaConf.save(OmegaConf.structured(config), folder / "tiny.yaml")
    return folder


def submit(cluster: Cluster, checkout: Path, *options: str, arguments: Sequence[str] = ()) -> str:
    options = ("--time=30", "--cpus-per-task=1", *options)
    return cluster.submit(*options, "slurm/train.sbatch", "tiny.yaml", *arguments, cwd=checkout)


def logs_of(checkout: Path) -> str:
    return "\n".join(path.read_text() for path in (checkout / "slurm" / "logs").glob("*.out"))


def wait_for_step(checkout: Path, run_dir: Path, step: int = 10) -> None:
    wait_until(lambda: newest_step(run_dir) >= step, TIMEOUT_S, lambda: logs_of(checkout))


def assert_done(cluster: Cluster, job: str, checkout: Path, restarts: int) -> str:
    state = cluster.wait_for_end(job, TIMEOUT_S)
    log = logs_of(checkout)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", str(restarts)), log
    return log


def assert_same_run(run_dir: Path, other: Path) -> None:
    """The last weights and averages are equal bit by bit, and every step is logged once."""
    name = Path("checkpoints") / f"step_{NUM_STEPS:08d}.ckpt"
    one, two = (torch.load(folder / name, weights_only=True) for folder in (run_dir, other))
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_close(one[key], two[key], rtol=0, atol=0)
    losses = [read_metrics(folder / "metrics.csv")["train/loss"] for folder in (run_dir, other)]
    assert [step for step, _ in losses[0]] == list(range(1, NUM_STEPS + 1))
    assert losses[0] == losses[1]
    assert (run_dir / "export" / "model_index.json").exists()
    assert not list((run_dir.parents[1] / "slurm" / "logs").glob("*.frozen"))


def assert_starts(run_dir: Path, *stopped_by: tuple[int, ...]) -> None:
    """The run needed these starts, with srun's status of each in the given ones."""
    rows = read_starts(run_dir)
    assert len(rows) == len(stopped_by)
    for row, statuses in zip(rows, stopped_by, strict=True):
        assert row["status"] in statuses
    assert rows[-1]["step_after"] == NUM_STEPS


def test_time_limit_signal_requeues_on_two_nodes_with_the_code_of_the_first_start(
    cluster: Cluster, checkout: Path, unbroken: Path
) -> None:
    job = submit(cluster, checkout, *TWO_NODES)
    run_dir = checkout / "runs" / f"tiny-{job}"
    wait_for_step(checkout, run_dir)
    for edited in ("train/run.py", "scripts/cluster/slurm_job.py", "slurm/launch.py"):
        (checkout / edited).write_text("raise SystemExit('edited')\n")
    (checkout / "tiny.yaml").write_text("seed: 7\n")
    cluster.run("scancel", "--signal=USR1", job)
    log = assert_done(cluster, job, checkout, restarts=1)
    assert "USR1: finishing this step, then saving" in log
    assert "requeued" in log and "edited" not in log
    assert_starts(run_dir, STOPPED, (0,))
    assert_same_run(run_dir, unbroken)


def test_a_killed_task_ends_the_others_and_is_made_good(
    cluster: Cluster, checkout: Path, unbroken: Path
) -> None:
    job = submit(cluster, checkout, *TWO_TASKS)
    run_dir = checkout / "runs" / f"tiny-{job}"
    wait_for_step(checkout, run_dir)
    os.kill(pid_of_task(cluster, job, 1), signal.SIGKILL)
    log = assert_done(cluster, job, checkout, restarts=1)
    assert "another process of this run ended" in log
    assert "unexpected error" not in log
    # srun's status is the highest of its tasks': that of the killed one, or of the one it ended.
    assert_starts(run_dir, (137, *STOPPED), (0,))
    assert_same_run(run_dir, unbroken)


@pytest.mark.parametrize("partition", ["low", "abrupt"])
def test_preemption_saves_requeues_and_continues(
    cluster: Cluster, checkout: Path, unbroken: Path, partition: str
) -> None:
    """With a time of grace the job requeues itself; without it, SLURM does. wandb has one run."""
    options = (f"--partition={partition}", *TWO_TASKS)
    job = submit(
        cluster, checkout, *options, arguments=["wandb.enabled=true", "data.num_workers=1"]
    )
    run_dir = checkout / "runs" / f"tiny-{job}"
    wait_for_step(checkout, run_dir)
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.submit(*urgent, cwd=checkout)
    wait_until(lambda: cluster.state(job)["Restarts"] == "1", TIMEOUT_S, lambda: logs_of(checkout))
    # The first start may still be saving: SLURM counts the restart when it sends the signal.
    saved = newest_step(run_dir)
    log = assert_done(cluster, job, checkout, restarts=1)
    assert "TERM: finishing this step, then saving" in log
    resumed = re.search(rf"resuming {run_dir.relative_to(checkout)} at step (\d+)", log)
    assert resumed and int(resumed[1]) >= saved
    assert_same_run(run_dir, unbroken)
    run_id = (run_dir / "wandb" / "run_id").read_text()
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{run_id}"))) == 2


def test_elements_of_an_array_keep_apart(cluster: Cluster, checkout: Path) -> None:
    """Element 1 is stopped and requeued alone; both end with the same weights."""
    array = submit(cluster, checkout, "--array=0-1", *ONE_TASK)
    run_dirs = [checkout / "runs" / f"tiny-{array}_{number}" for number in (0, 1)]
    wait_for_step(checkout, run_dirs[1])
    cluster.run("scancel", "--signal=USR1", f"{array}_1")
    for number in (0, 1):
        assert_done(cluster, f"{array}_{number}", checkout, restarts=number)
    assert_starts(run_dirs[0], (0,))
    assert_starts(run_dirs[1], STOPPED, (0,))
    assert_same_run(run_dirs[1], run_dirs[0])


def test_wrong_input_ends_the_job_with_status_2_and_leaves_nothing(
    cluster: Cluster, checkout: Path
) -> None:
    wrong = {
        "trainer.devices=2": "trainer.devices=2 disagrees with --ntasks-per-node=1",
        "data.shards=nowhere": "data.shards=nowhere",
    }
    for argument, message in wrong.items():
        job = submit(cluster, checkout, *ONE_TASK, arguments=[argument])
        state = cluster.wait_for_end(job, TIMEOUT_S)
        log = logs_of(checkout)
        assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0"), log
        assert message in log and "Traceback" not in log
    assert not list((checkout / "runs").glob("*"))


def test_an_encoding_on_two_nodes_that_a_signal_stops_once_has_the_bytes_of_one_process(
    cluster: Cluster, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny_shards(tmp_path / "images", NUM_ENCODED)
    options: dict[str, Any] = {"source": str(source), "checkpoint": "base", "device": "cpu"}
    options |= {"resolution": 16, "batch_size": 1, "samples_per_shard": 1, "num_workers": 0}
    arguments = [f"{name}={value}" for name, value in options.items()]
    job = cluster.submit(
        "--time=30",
        "--cpus-per-task=1",
        *TWO_NODES,
        "slurm/encode.sbatch",
        "output=latents",
        *arguments,
        cwd=checkout,
    )
    parts = checkout / ".latents.partial" / "parts"
    wait_until(lambda: names_in(parts), TIMEOUT_S, lambda: logs_of(checkout))
    cluster.run("scancel", "--signal=USR1", job)
    log = assert_done(cluster, job, checkout, restarts=1)
    assert "stopped by SIGUSR1; the same command continues" in log and "requeued" in log
    assert re.search(rf"encoded {NUM_ENCODED} samples in {NUM_ENCODED} shards, \d+ of them", log)
    monkeypatch.chdir(checkout)
    encode(EncodeConfig(output="unbroken", num_processes=1, **options))
    assert tree(checkout / "latents") == tree(checkout / "unbroken")


def test_a_search_on_two_nodes_that_a_signal_stops_once_finds_what_one_process_finds(
    cluster: Cluster, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a red photo", "a blue night", "a white wall", "a gray sea", "a black cat", "snow"]
    options = {"checkpoint": "base", "device": "cpu", "guidance_scale": "1", "num_steps": "4"}
    options |= {"budget_nfe": "200", "batch_size": "1", "prompts": json.dumps(prompts)}
    options |= {"verifiers.dark.kind": "luminance", "verifiers.dark.target": "0"}
    arguments = [f"{name}={value}" for name, value in options.items()]
    job = cluster.submit(
        "--time=30",
        "--cpus-per-task=1",
        *TWO_NODES,
        "slurm/search.sbatch",
        "output=found",
        *arguments,
        cwd=checkout,
    )
    parts = checkout / "found" / "parts"

    def are_searching() -> bool:
        files = [parts / name / "candidates.jsonl" for name in names_in(parts)]
        return sum(file.is_file() and file.stat().st_size > 0 for file in files) == 2

    wait_until(are_searching, TIMEOUT_S, lambda: logs_of(checkout))
    cluster.run("scancel", "--signal=USR1", job)
    log = assert_done(cluster, job, checkout, restarts=1)
    assert "stopped by SIGUSR1; the same command continues" in log and "requeued" in log
    monkeypatch.chdir(checkout)
    search_to_folder(load(SearchConfig, [*arguments, "output=unbroken"]))
    keys = ("prompt_index", "candidate", "seed", "score", "nfe")
    found, expected = (
        [tuple(json.loads(line)[key] for key in keys) for line in file.read_text().splitlines()]
        for file in (checkout / name / "winners.jsonl" for name in ("found", "unbroken"))
    )
    assert found == sorted(expected) and not parts.exists()


def test_an_export_job_writes_what_the_run_exported(cluster: Cluster, unbroken: Path) -> None:
    checkout = unbroken.parents[1]
    arguments = [f"checkpoint=runs/{unbroken.name}", "output=exported"]
    options = ("--time=30", "--cpus-per-task=1", *ONE_TASK)
    job = cluster.submit(*options, "slurm/export.sbatch", *arguments, cwd=checkout)
    assert "verified against diffusers" in assert_done(cluster, job, checkout, restarts=0)
    found, expected = tree(checkout / "exported"), tree(unbroken / "export")
    assert found.keys() == expected.keys()
    names = ("README.md", "/config.json")  # which name where the weights came from
    assert all(found[name] == expected[name] for name in found if not name.endswith(names))


def pid_of_task(cluster: Cluster, job: str, rank: int) -> int:
    """Finds the Python process of one task by its environment; other clusters number jobs alike."""
    conf = cluster.environment["SLURM_CONF"]
    names = {"SLURM_CONF": conf, "SLURM_JOB_ID": job, "SLURM_PROCID": rank}
    wanted = {f"{name}={value}".encode() for name, value in names.items()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            is_task = b"slurm/task.py" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if wanted <= environment and is_task:
            return int(folder.name)
    raise AssertionError(f"task {rank} of job {job} does not run")
