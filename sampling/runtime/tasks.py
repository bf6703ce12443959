"""Which of several processes this one is, by the environment of torchrun or SLURM.

Such processes need no rendezvous where they meet in the folder that they fill.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

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
    """Returns this process's place from the launcher; one of one without a launcher."""
    for rank, count, local_rank in VARIABLES:
        try:
            task = Task(
                int(environment[rank]), int(environment[count]), int(environment.get(local_rank, 0))
            )
        except (KeyError, ValueError):
            continue
        return task if 0 <= task.rank < task.count else Task()
    return Task()
