"""Writing metrics.csv (train/records/metrics_file.py) and whatever other logger a trainer has."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from blackpoint.train.records.first_process import is_first_process
from blackpoint.train.records.metrics_file import drop_rows_after


class CsvMetrics(Logger):
    """Appends to a metrics.csv; only the first process writes."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = path
        if is_first_process():
            drop_rows_after(path, resume_step)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: the run directory holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends the numbers in one write."""
        lines = [f"{step},{name},{float(value):.8g}\n" for name, value in metrics.items()]
        with self.path.open("a", encoding="ascii") as file:
            file.write("".join(lines))


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Writes the numbers of the optimizer step just done to every logger.

    A tracker that fails is left out from then on: SLURM's SIGTERM goes to wandb's own process too,
    and must not cost the step that is about to be saved.
    """
    for logger in list(trainer.loggers):
        try:
            logger.log_metrics(dict(metrics), step=trainer.global_step)
        except Exception as error:
            if isinstance(logger, CsvMetrics):
                raise
            trainer.loggers = [other for other in trainer.loggers if other is not logger]
            print(
                f"note: {type(logger).__name__} failed ({type(error).__name__}: {error}); this "
                "start logs to metrics.csv alone from here on",
                file=sys.stderr,
            )
