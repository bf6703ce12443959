"""`blackpoint train`: fine-tunes a checkpoint as its config says."""

import contextlib
import os
from pathlib import Path

from blackpoint.data.files.errors import Resumable, Unreachable
from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import stoppable
from blackpoint.train.config.config import TrainConfig


def config_class() -> type[TrainConfig]:
    return TrainConfig


def run(config: TrainConfig) -> int:
    try:
        with stoppable():
            with uncollected():
                if config.plan:
                    from blackpoint.train.plan.plan import show_plan as start
                else:
                    from blackpoint.train.run import fit as start

            return start(config)
    except Unreachable as error:
        if "BLACKPOINT_UNREACHABLE" in os.environ:  # a mark for scripts/cluster/slurm_job.py
            with contextlib.suppress(OSError):
                Path(os.environ["BLACKPOINT_UNREACHABLE"]).touch()
        raise Resumable(str(error)) from error
