"""How the processes of a run find each other: SLURM's tasks, or what Lightning starts by itself."""

import os
from collections.abc import Mapping

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from sampling.errors import UserError
from train.config import TrainConfig


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
