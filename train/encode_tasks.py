"""Which of several processes this one is, and what each of its own processes computes on.

Tasks that SLURM or torchrun starts need no rendezvous: they meet in the folder that they fill.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from data.workers import usable_cores
from sampling.sample import find_device
from train.encode_config import EncodeConfig

# rank, number of tasks, rank on the machine; torchrun's first, which may run under srun
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Task:
    """One process that a launcher started: task `rank` of `count`."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def this_task(environment: Mapping[str, str] = os.environ) -> Task:
    """Returns what the launcher says of this process; one of one without a launcher."""
    for rank, count, local_rank in VARIABLES:
        try:
            task = Task(
                int(environment[rank]), int(environment[count]), int(environment.get(local_rank, 0))
            )
        except (KeyError, ValueError):
            continue
        return task if 0 <= task.rank < task.count else Task()
    return Task()


def process_devices(config: EncodeConfig, task: Task) -> list[str]:
    """Returns the device of each process that this task starts.

    num_processes=0: one a GPU, or one a core; of several tasks, each one for itself.
    """
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        count = config.num_processes or (1 if task.count > 1 else num_gpus)
        first = task.local_rank * count
        return [f"cuda:{number % num_gpus}" for number in range(first, first + count)]
    device = find_device(config.device)
    count = config.num_processes
    if not count and device.type != "cpu":
        count = 1
    if not count:
        count = usable_cores()
        if task.count > 1:  # tasks may share all cores of a machine, unless SLURM shared them out
            count = min(count, int(os.environ.get("SLURM_CPUS_PER_TASK", 1)))
    return [str(device)] * count
