"""Devices of the processes of an encoding task."""

import os

import torch

from blackpoint.data.work.workers import usable_cores
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample import find_device
from blackpoint.train.encode.config import EncodeConfig


def process_devices(config: EncodeConfig, task: Task) -> list[str]:
    """Returns the device of each process that this task starts.

    num_processes=0: one per GPU, or one per core; of several tasks, each one for itself.
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
