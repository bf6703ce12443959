"""metrics.csv: one row a number, `step,name,value`, appended as it is measured.

`step` counts the optimizer steps done. A number is written once for a step: when a run resumes at
step N, rows beyond N and a last line that a kill left torn are dropped, and the run writes them
again.
"""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

HEADER = ("step", "name", "value")


def is_first_process() -> bool:
    """Whether this process writes; known from the environment before a trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


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
    """Writes the numbers of the optimizer step just done to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads metrics.csv as name -> [(step, value), ...] in the order written."""
    series: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in _whole_rows(path):
        series.setdefault(name, []).append((step, value))
    return series


def drop_rows_after(path: Path, step: int) -> None:
    """Keeps the whole rows up to `step`, or starts the file with its header."""
    kept = [row for row in _whole_rows(path) if row[0] <= step] if path.exists() else []
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows((row_step, name, f"{value:.8g}") for row_step, name, value in kept)
    os.replace(temporary, path)


def _whole_rows(path: Path) -> list[tuple[int, str, float]]:
    rows = []
    text = path.read_text(encoding="ascii", errors="replace")
    for line in text[: text.rfind("\n") + 1].splitlines()[1:]:
        parts = line.split(",")
        try:
            rows.append((int(parts[0]), parts[1], float(parts[2])))
        except (ValueError, IndexError):
            continue  # torn by a kill
    return rows
