"""Laws of the batch script: allocation, frozen copy, who goes back to the queue. Without SLURM."""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import CODE_ROOT
from blackpoint.data.files.signals import RESUMABLE_STATUS
from blackpoint.scripts.cluster import slurm_allocation, slurm_job
from blackpoint.scripts.cluster.frozen import (
    CODE,
    freeze,
    is_frozen,
    only_job,
    remove_unused,
    unfreeze,
)
from blackpoint.scripts.cluster.requeue import (
    MAX_FRUITLESS,
    MAX_RESTARTS,
    RECORD,
    read_starts,
    reason_to_end,
    record_start,
    requeue,
)
from blackpoint.scripts.cluster.slurm_allocation import expand, read_allocation, rendezvous
from blackpoint.scripts.cluster.slurm_job import config_of_job, train_job
from blackpoint.scripts.measurements.requeue_study import Requeue, RequeueStudyConfig, page
from blackpoint.train.records.run_directory import RunRecord, write_records
from tests.tiny_run import tiny_config

JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "blackpoint",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "node[1-2]",
}
ELEMENT = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH but for a stand-in of srun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_command(folder, "srun", "exit 0")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM", "MASTER"))]:
        monkeypatch.delenv(name)
    return folder


def write_command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_an_allocation_names_nodes_tasks_and_this_element_alone() -> None:
    allocation = read_allocation(JOB)
    assert (allocation.num_nodes, allocation.tasks_per_node, allocation.restart) == (2, 2, 0)
    assert allocation.element == "17"
    assert read_allocation(JOB | ELEMENT | {"SLURM_RESTART_COUNT": "2"}).restart == 2
    assert read_allocation(JOB | ELEMENT).element == "15_3"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "3"}, "--ntasks=3 disagrees with --nodes=2 --ntasks-per-node=2"),
        ({"SLURM_JOB_NAME": "bash"}, "--job-name=bash .* another name"),
        ({"SLURM_JOB_NAME": "interactive"}, "--job-name=interactive"),
        ({"SLURM_TASKS_PER_NODE": "3,1"}, r"different numbers of tasks \(3,1\)"),
    ],
)
def test_allocations_that_cannot_train_are_refused(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_allocation(JOB | environment)


def test_outside_a_job_and_without_srun(commands: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="submit it with sbatch"):
        read_allocation({})
    (commands / "srun").unlink()
    with pytest.raises(UserError, match="srun is not on the PATH of"):
        read_allocation(JOB)
    assert slurm_job.main(["train"]) == 2
    assert "submit it with sbatch" in capsys.readouterr().err


def test_arguments_know_the_patterns_of_sbatch() -> None:
    allocation = read_allocation(JOB | ELEMENT)
    assert expand("run_dir=runs/%A/seed_%a_%j", allocation) == "run_dir=runs/15/seed_3_17"
    with pytest.raises(UserError, match="seed=%a: .* --array"):
        expand("seed=%a", read_allocation(JOB))


def write_config(folder: Path, **overrides: Any) -> Path:
    config = tiny_config(Path("runs/elsewhere"), Path("base"), Path("shards"), **overrides)
    path = folder / "tiny.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    return path


def test_devices_and_nodes_follow_from_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = write_config(tmp_path, **{"trainer.devices": 4})
    config = config_of_job(read_allocation(JOB), [str(yaml), "seed=3"])
    assert (config.trainer.devices, config.trainer.num_nodes, config.seed) == (2, 2, 3)
    assert "trainer.devices=2, as SLURM gives; the config file has 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.devices=8", "trainer.devices=8 disagrees with --ntasks-per-node=2"),
        ("trainer.num_nodes=1", "trainer.num_nodes=1 disagrees with --nodes=2"),
        ("batch_size=6", "batch_size=6 cannot be divided among 4 processes"),
    ],
)
def test_arguments_that_contradict_the_job_are_refused(
    tmp_path: Path, argument: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of_job(read_allocation(JOB), [str(write_config(tmp_path)), argument])


@pytest.mark.parametrize(
    ("job", "arguments", "run_dir"),
    [
        (JOB, [], "runs/tiny-17"),
        (JOB, ["run_dir=runs/x"], "runs/x"),
        (JOB | ELEMENT, [], "runs/tiny-15_3"),
        (JOB | ELEMENT, ["run_dir=runs/x"], "runs/x_3"),
        (JOB | ELEMENT, ["run_dir=runs/x/%a"], "runs/x/3"),
    ],
)
def test_jobs_and_elements_never_share_a_run_directory(
    tmp_path: Path, job: dict[str, str], arguments: list[str], run_dir: str
) -> None:
    config = config_of_job(read_allocation(job), [str(write_config(tmp_path)), *arguments])
    assert config.run_dir == run_dir


def test_a_run_of_epochs_goes_on_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, epochs = tmp_path / "run", {"trainer.max_epochs": 2.0, "optimizer.decay": "linear"}
    begun = tiny_config(run_dir, Path("base"), Path("shards"), **epochs)  # its max_steps: 6
    write_records(RunRecord.read(run_dir), begun)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "step_00000004.ckpt").touch()
    yaml = write_config(tmp_path, **epochs, **{"trainer.max_steps": 10_000})
    monkeypatch.setattr(slurm_job, "run_frozen", lambda *_: 0)
    assert train_job(read_allocation(JOB), [str(yaml), f"run_dir={run_dir}"]) == 0


def files_of(package: Path) -> set[Path]:
    """Names all that a package holds, templates and styles included."""
    found = (path for path in package.rglob("*") if "__pycache__" not in path.parts)
    return {path.relative_to(package) for path in found if path.is_file()}


def test_the_frozen_copy_runs_itself_wherever_it_is_called(tmp_path: Path) -> None:
    frozen = freeze(tmp_path / "run", "seed: 3\n")
    assert is_frozen(frozen) and not is_frozen(CODE_ROOT)
    for package in (name for name in CODE if name != "slurm"):  # where jobs write their logs
        assert files_of(frozen / package) == files_of(CODE_ROOT / package)
    assert (frozen / "config.yaml").read_text() == "seed: 3\n"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "cli.py").write_text("raise SystemExit('of the working directory')")
    command = [sys.executable, str(frozen / "slurm" / "task.py"), "--help"]
    assert b"usage: blackpoint" in subprocess.run(command, capture_output=True, check=True).stdout


def test_code_is_frozen_once_and_no_parts_are_left(tmp_path: Path) -> None:
    frozen = freeze(tmp_path / "run", "seed: 3\n")
    (frozen / "train" / "run.py").write_text("of the first start")
    assert freeze(tmp_path / "run", "seed: 4\n") == frozen
    assert (frozen / "train" / "run.py").read_text() == "of the first start"
    assert (frozen / "config.yaml").read_text() == "seed: 4\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["frozen"]
    with only_job(tmp_path / "run"):
        unfreeze(tmp_path / "run")
        remove_unused(tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_second_job_leaves_the_code_of_one_that_is_starting_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(write_config(tmp_path)), "run_dir=runs/x"]
    frozen = tmp_path / "runs" / "x" / "frozen"

    def srun(*_: Any) -> int:
        config = (frozen / "config.yaml").read_text()
        with pytest.raises(UserError, match='runs/x is in use by another process .*"job": "17"'):
            train_job(read_allocation(JOB | {"SLURM_JOB_ID": "18"}), [*arguments, "seed=5"])
        assert (frozen / "train" / "run.py").exists()
        assert (frozen / "config.yaml").read_text() == config
        return 0

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(slurm_job, "srun", srun)
    for job in ("17", "19"):  # the first one ended before its run began
        assert train_job(read_allocation(JOB | {"SLURM_JOB_ID": job}), arguments) == 0


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run_dir=.*file/run: can't be written"):
        freeze(tmp_path / "file" / "run", "")
    refused = pytest.raises(UserError, match="run_dir=.*file/run: can't be written")
    with refused, only_job(tmp_path / "file" / "run"):
        pass


def starts(*steps: int) -> list[dict[str, Any]]:
    """Rows of starts that went from one of the steps to the next."""
    return [
        {"step_before": before, "step_after": after}
        for before, after in zip((0, *steps), steps, strict=False)
    ]


@pytest.mark.parametrize("status", [75, 138, 143])
def test_a_signal_requeues_also_before_the_first_step_but_not_for_ever(status: int) -> None:
    assert reason_to_end(status, False, 0, starts(10)) is None
    assert reason_to_end(status, False, 0, starts(0)) is None
    assert reason_to_end(status, False, 5, starts(10, *[10] * (MAX_FRUITLESS - 1))) is None
    end = reason_to_end(status, False, 5, starts(10, *[10] * MAX_FRUITLESS))
    assert end is not None and "no step has been saved in the last 3 starts" in end
    end = reason_to_end(status, False, MAX_RESTARTS, starts(10))
    assert end is not None and "submit it again" in end


def test_a_killed_task_is_requeued_only_after_progress() -> None:
    assert reason_to_end(137, False, 0, starts(10)) is None
    end = reason_to_end(137, False, 1, starts(10, 10))
    assert end is not None and "no step has been saved since the start" in end


@pytest.mark.parametrize(("status", "failed"), [(1, False), (2, False), (137, True), (75, True)])
def test_a_failure_of_the_run_itself_is_never_requeued(status: int, failed: bool) -> None:
    end = reason_to_end(status, failed, 0, starts(10))
    assert end is not None and "fail again" in end


@pytest.mark.parametrize(
    ("marks", "status"),
    [
        (["UNREACHABLE"], RESUMABLE_STATUS),
        (["UNREACHABLE", "FAILED"], RESUMABLE_STATUS),
        (["FAILED"], 1),
        ([], 134),
    ],
)
def test_an_outage_of_the_storage_is_requeued_whatever_ended_the_other_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: list[str], status: int
) -> None:
    """NCCL aborts a process that loses another one, before any step may have been saved."""

    def srun(*arguments: Any) -> int:
        for name in marks:
            Path(arguments[-1][f"BLACKPOINT_{name}"]).touch()
        return 134

    monkeypatch.setattr(slurm_job, "srun", srun)
    monkeypatch.setattr(slurm_job, "requeue", lambda allocation: "requeued")
    frozen = freeze(tmp_path / "run", "")
    assert slurm_job.run_frozen(read_allocation(JOB), frozen) == status
    assert {path.name for path in frozen.parent.iterdir()} == {"frozen", RECORD}


@pytest.mark.parametrize(
    "torn", [b'{"time": "2026', b'{"time": "2026\n', b'{"step_after": 0}', b"\xff"]
)
def test_a_line_that_a_full_disk_cut_off_costs_no_other_start(tmp_path: Path, torn: bytes) -> None:
    rows = starts(10, 20, 30)
    record_start(tmp_path, rows[0])
    with (tmp_path / RECORD).open("ab") as file:
        file.write(torn)
    for row in rows[1:]:
        record_start(tmp_path, row)
    found = [row["step_after"] for row in read_starts(tmp_path)]
    assert [step for step in found if step] == [10, 20, 30]


@pytest.mark.parametrize(
    ("scontrol", "answer"),
    [
        ("echo JobState=RUNNING", "requeued"),
        ("echo JobState=COMPLETING", "SLURM is ending the job itself .state COMPLETING"),
        ("echo denied >&2; exit 1", r"scontrol requeue failed \(denied\)"),
        ('[ "$1" = show ] && echo JobState=RUNNING || { echo no >&2; exit 1; }', r"failed \(no\)"),
        (None, "scontrol is not on this node"),
    ],
)
def test_requeueing_says_what_it_did(commands: Path, scontrol: str | None, answer: str) -> None:
    if scontrol is not None:
        write_command(commands, "scontrol", scontrol)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{commands}:/usr/bin:/bin" if scontrol else str(commands))
        said = requeue(read_allocation(JOB))
    assert re.search(answer, said)


def test_tasks_meet_where_the_first_node_can_be_found(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_node = JOB | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
    assert rendezvous(read_allocation(one_node))["MASTER_ADDR"] == "127.0.0.1"
    answers = 'case "$2" in hostnames) echo nowhere.invalid;; *) echo NodeAddr=127.0.0.9;; esac'
    write_command(commands, "scontrol", answers)
    monkeypatch.setattr(slurm_allocation, "_resolves", lambda host: host == "127.0.0.9")
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    assert rendezvous(read_allocation(JOB))["MASTER_ADDR"] == "127.0.0.9"
    monkeypatch.setattr(slurm_allocation, "_resolves", lambda host: False)
    with pytest.raises(UserError, match="MASTER_ADDR: .* nowhere.invalid, does not resolve"):
        rendezvous(read_allocation(JOB))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert rendezvous(read_allocation(JOB)) == {}


def test_the_page_of_requeues_counts_what_hung_and_says_how_it_ended() -> None:
    content = {
        "date": "2026-01-01",
        "machine": "m",
        "slurm": "s",
        "versions": {"torch": "2"},
        "settings": asdict(RequeueStudyConfig(arguments="seed=3", max_steps=4)),
        "requeues": [asdict(Requeue(2, 0.5, 8.0, 20.0, False)), asdict(Requeue(0))],
    }
    assert "1 of 2 requeues hung.\n" in page(content)
    found = page(content | {"end": {"state": "COMPLETED", "step": 4}})
    assert "1 of 2 requeues hung. Then the job ended COMPLETED at step 4." in found
    assert "configs/tiny_zero_snr.yaml seed=3`" in found
    assert "| 1 | 2 | 0.5 | 8.0 | 20.0 |\n| 2 | 0 | hung | hung | hung |\n" in found


@pytest.mark.parametrize("missing", ["munged", "slurmctld", "slurmd", "sbatch"])
def test_continuous_integration_fails_where_a_program_of_slurm_cannot_be_installed(
    commands: Path, missing: str
) -> None:
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        write_command(commands, name, "exit 1")
    script = (CODE_ROOT / ".ci" / "install_slurm").read_text()
    path = commands.parent / "install_slurm"
    path.write_text(script.replace("/usr/sbin", str(commands)))
    assert subprocess.run(["/bin/bash", str(path)]).returncode == 0
    (commands / missing).unlink()
    write_command(commands, "id", "echo 1000")
    found = subprocess.run(["/bin/bash", str(path)], stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1
    assert found.stderr.rstrip().endswith(f"only root with apt-get can; missing: {missing}")


@pytest.mark.parametrize("name", ["train", "encode", "export"])
def test_what_people_submit_is_valid_and_logs_where_a_folder_is(name: str) -> None:
    path = CODE_ROOT / "slurm" / f"{name}.sbatch"
    subprocess.run(["/bin/bash", "-n", str(path)], check=True)
    text = path.read_text()
    for option in ("requeue", "open-mode=append", "output=slurm/logs/%x-%j.out", "time="):
        assert f"#SBATCH --{option}" in text
    assert ("#SBATCH --signal=USR1@" in text) == (name != "export")
    assert (CODE_ROOT / "slurm" / "logs").is_dir()
