"""The batch script's side of a SLURM job: config from the allocation, srun, and what comes after.

    read the allocation -> freeze code and config -> srun -> requeue, or end

Logs to stderr, which is the job's log. Exit status as of the command that it starts.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import CODE_ROOT
from blackpoint.data.files.signals import RESUMABLE_STATUS
from blackpoint.scripts.cluster.frozen import (
    CONFIG,
    freeze,
    is_frozen,
    only_job,
    remove_unused,
    unfreeze,
)
from blackpoint.scripts.cluster.requeue import (
    MAX_RESTARTS,
    STOPPED,
    read_starts,
    reason_to_end,
    record_start,
    requeue,
)
from blackpoint.scripts.cluster.slurm_allocation import (
    Allocation,
    expand,
    read_allocation,
    rendezvous,
)
from blackpoint.scripts.config import load, read_yaml, to_yaml
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.run_directory import newest_step

LOGS = Path("slurm/logs")
LAUNCH = Path("slurm/launch.py")


def main(argv: Sequence[str]) -> int:
    """Runs one start of a job and returns the exit status of the batch script."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave_to_tasks)
    verb = list(argv[:2] if argv[:1] == ["data"] else argv[:1])
    arguments = list(argv[len(verb) :])
    try:
        allocation = read_allocation(os.environ)
        if verb == ["train"]:
            return train_job(allocation, arguments)
        return plain_job(allocation, verb, arguments)
    except UserError as error:
        say(str(error))
        return 2


def train_job(allocation: Allocation, arguments: list[str]) -> int:
    """Starts, or continues, the run of a job from its frozen copy."""
    if is_frozen(CODE_ROOT):
        with only_job(CODE_ROOT.parent):
            return run_frozen(allocation, CODE_ROOT)
    config = config_of_job(allocation, arguments)
    run_dir = Path(config.run_dir)
    if (run_dir / CONFIG).exists() and config.trainer.max_epochs is not None:
        from blackpoint.train.records.sizes import with_max_steps  # torch, which a new run spares

        config = with_max_steps(config, run_dir)
    check_continues(run_dir, config)
    with only_job(run_dir):
        if not (run_dir / CONFIG).exists():
            unfreeze(run_dir)  # of a run that never began
        is_new = not (run_dir / "frozen").exists()
        frozen = freeze(run_dir, to_yaml(config)).resolve()
        point_to(link_of(allocation), frozen)
        if is_new:
            return run_frozen(allocation, frozen)
    say(f"continuing with the code that {run_dir} was started with, in {frozen}")
    os.execv(sys.executable, [sys.executable, str(frozen / LAUNCH), "train", *arguments])


def run_frozen(allocation: Allocation, frozen: Path) -> int:
    """Runs the frozen copy in every task; then requeues the job, or ends it."""
    link, run_dir = link_of(allocation), frozen.parent
    before = newest_step(run_dir)
    marks = {
        f"BLACKPOINT_{name.upper()}": run_dir / f".{name}.{allocation.element}"
        for name in ("failed", "unreachable")
    }
    for mark in marks.values():
        mark.unlink(missing_ok=True)
    command = ["train", str(frozen / CONFIG), *from_allocation(allocation)]
    extra = {name: str(mark) for name, mark in marks.items()}
    status = srun(allocation, frozen, command, extra)
    failed, unreachable = (mark.exists() for mark in marks.values())
    for mark in marks.values():
        mark.unlink(missing_ok=True)
    if unreachable:  # and what became of the other tasks follows from it
        status, failed = RESUMABLE_STATUS, False
    if status == 2 and not (run_dir / CONFIG).exists():
        unfreeze(run_dir)
        remove_unused(run_dir)
        link.unlink(missing_ok=True)
        return status
    row = {"job": allocation.element, "restart": allocation.restart, "status": status}
    row |= {"step_before": before, "step_after": newest_step(run_dir)}
    rows = [*read_starts(run_dir), row]
    record_start(run_dir, row)
    if status == 0:
        link.unlink(missing_ok=True)
        return 0
    reason = reason_to_end(status, failed, allocation.restart, rows)
    if reason:
        say(f"not requeued (status {status}): {reason}")
        link.unlink(missing_ok=True)
        return 1 if failed and status != 2 else status
    say(f"at step {row['step_after']}: {requeue(allocation)}")
    return RESUMABLE_STATUS


def plain_job(allocation: Allocation, verb: list[str], arguments: list[str]) -> int:
    """Runs a command that leaves nothing half-written; stopped, it is started again."""
    arguments = [expand(argument, allocation) for argument in arguments]
    status = srun(allocation, CODE_ROOT, [*verb, *arguments], {})
    if status not in STOPPED or allocation.restart >= MAX_RESTARTS:
        return status
    say(requeue(allocation))
    return RESUMABLE_STATUS


def config_of_job(allocation: Allocation, arguments: list[str]) -> TrainConfig:
    """Resolves the config: the user's, on the nodes and tasks that SLURM gave.

    Raises UserError where the arguments contradict them. What a config file says of devices is
    meant for a run outside SLURM and gives way, as does its run_dir: jobs never share one.
    """
    own_run_dir = any(a.startswith("run_dir=") and "%a" in a for a in arguments)
    arguments = [expand(argument, allocation) for argument in arguments]
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for key, value, option in (
        ("trainer.devices", allocation.tasks_per_node, "--ntasks-per-node"),
        ("trainer.num_nodes", allocation.num_nodes, "--nodes"),
    ):
        if key in given and given[key] != str(value):
            raise UserError(
                f"{key}={given[key]} disagrees with {option}={value} of the job; leave {key} out "
                f"(it follows from the job), or submit with {option}={given[key]}"
            )
    name = "run"
    if arguments and "=" not in arguments[0]:
        name = Path(arguments[0]).stem
        _say_what_gives_way(read_yaml(arguments[0]), allocation)
    run_dir = given.get("run_dir", f"runs/{name}-{allocation.element}")
    if "run_dir" in given and allocation.array_element and not own_run_dir:
        run_dir += f"_{allocation.array_element}"  # elements of an array never share one
    config = load(TrainConfig, [*arguments, *from_allocation(allocation), f"run_dir={run_dir}"])
    say(f"run_dir={run_dir}")
    return config


def from_allocation(allocation: Allocation) -> list[str]:
    """Returns the arguments that follow from the job."""
    return [
        f"trainer.devices={allocation.tasks_per_node}",
        f"trainer.num_nodes={allocation.num_nodes}",
    ]


def srun(allocation: Allocation, code: Path, command: list[str], extra: dict[str, str]) -> int:
    """Runs the command in every task and returns srun's exit status: the highest of all tasks."""
    environment = os.environ | rendezvous(allocation) | extra
    options = ["--kill-on-bad-exit=1"]  # a dead task's peers would wait for it
    options += ["--wait=0"]  # the first task exports when the others have ended
    if "SLURM_CPUS_PER_TASK" in environment:  # srun no longer takes it from sbatch (22.05)
        options.append(f"--cpus-per-task={environment['SLURM_CPUS_PER_TASK']}")
        environment.setdefault("OMP_NUM_THREADS", environment["SLURM_CPUS_PER_TASK"])
    task = [sys.executable, str(code / "slurm" / "task.py"), *command]
    process = subprocess.Popen(["srun", *options, *task], env=environment)
    status = process.wait()
    return 128 - status if status < 0 else status


def link_of(allocation: Allocation) -> Path:
    """Returns the link to a job's code, which slurm/train.sbatch follows."""
    return LOGS / f"{allocation.job}.frozen"


def point_to(link: Path, frozen: Path) -> None:
    """Tells the job's later starts where its code is."""
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(frozen)
    except OSError as error:
        raise UserError(f"{link}: can't be written ({error.strerror}); make it writable") from None


def say(text: str) -> None:
    """Writes a line to the job's log."""
    print(f"blackpoint: {text}", file=sys.stderr, flush=True)


def _say_what_gives_way(values: dict[str, Any], allocation: Allocation) -> None:
    trainer = values.get("trainer") or {}
    for key, value in (
        ("devices", allocation.tasks_per_node),
        ("num_nodes", allocation.num_nodes),
    ):
        if isinstance(trainer, dict) and trainer.get(key, value) != value:
            say(f"note: trainer.{key}={value}, as SLURM gives; the config file has {trainer[key]}")


def _leave_to_tasks(number: int, frame: FrameType | None) -> None:
    """Goes on waiting: the tasks have the signal too, and save."""
