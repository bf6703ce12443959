"""How the processes of a run find each other: torchrun, SLURM's tasks, or what Lightning starts."""

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import torch.distributed
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.signals import RESUMABLE_STATUS
from blackpoint.train.config.config import TrainConfig

LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What Lightning gives the processes that it starts."""
FIRST_PROCESS = "BLACKPOINT_FIRST_PROCESS"
"""Its number, for those that Lightning starts."""
LOOK_EVERY_S = 2.0


def as_launched(config: TrainConfig) -> TrainConfig:
    """Returns the config with the processes that torchrun started as its devices and nodes.

    Raises UserError where the config asks for others, and for a rank in the environment that no
    launcher of a whole run has set: such a process would wait for others, or write nothing.
    """
    environment = os.environ
    if not TorchElasticEnvironment.detect():
        _refuse_stray_rank(environment)
        return config
    world_size, devices = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    num_nodes, rest = divmod(world_size, devices)
    asked = (config.trainer.devices, config.trainer.num_nodes)
    if rest or asked not in ((1, 1), (devices, num_nodes)):
        raise UserError(
            f"trainer.devices={asked[0]} on trainer.num_nodes={asked[1]}, but torchrun started "
            f"{world_size} processes, {devices} of them on this machine; give torchrun --nnodes="
            f"{asked[1]} --nproc-per-node={asked[0]}, or leave both keys out, and they are "
            "torchrun's"
        )
    return replace(config, trainer=replace(config.trainer, devices=devices, num_nodes=num_nodes))


def _refuse_stray_rank(environment: Mapping[str, str]) -> None:
    launched = {"RANK": "", "LOCAL_RANK": ""}
    if "SLURM_STEP_ID" in environment:
        launched = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    if all(name in environment for name in LIGHTNING):
        launched["LOCAL_RANK"] = "LOCAL_RANK"
    for name, source in launched.items():
        if name in environment and environment[name] != environment.get(source):
            raise UserError(
                f"{name}={environment[name]} is set in the environment, but neither torchrun nor "
                f"srun started this process: it would take itself for one of several; `unset {name}"
                "`, or start the run with torchrun or srun"
            )


def end_with_first_process() -> None:
    """Ends a process that Lightning starts when the first one is gone before they have met.

    Once they have met, a lost process ends the collective of the others. Before, torch waits half
    an hour for the address that the first one was to open.
    """
    if TorchElasticEnvironment.detect() or "SLURM_STEP_ID" in os.environ:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[FIRST_PROCESS] = str(os.getpid())
    elif (first := int(os.environ.get(FIRST_PROCESS, os.getpid()))) != os.getpid():
        threading.Thread(target=_end_with, args=(first,), daemon=True).start()


def _end_with(parent: int) -> None:
    while not torch.distributed.is_initialized():
        if os.getppid() != parent:
            line = "the first process of this run is gone; the same command continues it"
            print(line, file=sys.stderr, flush=True)
            os._exit(RESUMABLE_STATUS)
        time.sleep(LOOK_EVERY_S)


def cluster_environment(config: TrainConfig) -> ClusterEnvironment | None:
    """Returns SLURM's environment for a task of srun; None lets Lightning look elsewhere.

    In a SLURM job but outside srun, the processes are started from this one, as on a workstation.
    Raises UserError where srun started another number of tasks than the config asks for.
    """
    environment = os.environ
    if "SLURM_NTASKS" not in environment or TorchElasticEnvironment.detect():
        return None
    if "SLURM_STEP_ID" not in environment:
        if config.trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={config.trainer.num_nodes} needs one process on each node, and "
                "this one was not started by srun; use sbatch slurm/train.sbatch, or put `srun` "
                "before the command"
            )
        return LightningEnvironment()
    check_tasks(config, environment)
    # What Lightning reads, and SLURM leaves out where only --ntasks was given.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(config.trainer.devices))
    return SLURMEnvironment(auto_requeue=False)


def num_started(config: TrainConfig) -> int:
    """Returns how many of the run's processes exist at its start; these start the others later."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    return config.trainer.num_nodes


def check_tasks(config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Raises UserError where the tasks of srun are not the processes of the config."""
    num_tasks = int(environment["SLURM_NTASKS"])
    devices, num_nodes = config.trainer.devices, config.trainer.num_nodes
    if num_tasks != devices * num_nodes:
        raise UserError(
            f"trainer.devices={devices} on trainer.num_nodes={num_nodes} are {devices * num_nodes} "
            f"processes, but srun started {num_tasks} tasks (SLURM_NTASKS); give --nodes="
            f"{num_nodes} --ntasks-per-node={devices}, or set both keys to what SLURM gives"
        )
    if num_tasks > 1 and environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        raise UserError(
            f"--job-name={environment['SLURM_JOB_NAME']} tells Lightning that the job is "
            f"interactive, and then {num_tasks} tasks do not find each other; give the job another "
            "name"
        )
