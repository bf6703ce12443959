"""The images of an evaluation and their rows, batch by batch: generated, measured, kept.

What is finished is never generated again; a column that is added later is measured on the images
that are kept, or on images generated once more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchvision.transforms.functional import pil_to_tensor

from blackpoint.sampling.evaluation.generate import ImageGenerator, Job
from blackpoint.sampling.evaluation.measures import Measures, luminance_rows
from blackpoint.sampling.evaluation.metric import Pixels, Row
from blackpoint.sampling.evaluation.rows import (
    PARTS,
    Key,
    carried_columns,
    column_digest,
    finished_keys,
    read_rows,
    write_rows,
)
from blackpoint.sampling.evaluation.summary import JSON_FILE
from blackpoint.sampling.runtime.memory import GB, peak_bytes
from blackpoint.sampling.runtime.pictures import write_png
from blackpoint.sampling.runtime.sharing import share_of
from blackpoint.sampling.runtime.tasks import Task

IMAGE_COLUMN = "luminance"
"""Column that a row has once its image was generated."""


@dataclass(frozen=True)
class ImageRows:
    """The rows in a folder: missing rows, missing columns, and their measurement."""

    folder: Path
    jobs: Sequence[Job]
    measures: Measures
    batch_size: int
    num_kept: int | None
    """Images to keep, the first ones; None: all."""

    @property
    def columns(self) -> dict[str, str]:
        """Every measured column that stays: requested now or before."""
        return self.measures.asked | carried_columns(self.folder, self.measures.asked)

    def read(self) -> dict[Key, Row]:
        """Reads the rows of all processes."""
        return read_rows(self.folder, self.columns)

    def is_complete(self) -> bool:
        """Whether nothing is left to be generated, measured or kept here."""
        return not self._missing(self.read())

    def are_finished(self) -> bool:
        """Whether every image has its row, and in it every column that some process can measure."""
        return finished_keys(self.folder, self.measures.columns) >= {job.key for job in self.jobs}

    def write_missing(self, generator: ImageGenerator, task: Task) -> None:
        """Generates and measures the batches of this process that are not finished."""
        columns, have = self.columns, self.read()
        missing = self._missing(have)
        if missing and task.rank == 0:
            (self.folder / JSON_FILE).unlink(missing_ok=True)  # it says that all is done
        size = self.batch_size
        batches = [self.jobs[start : start + size] for start in range(0, len(self.jobs), size)]
        share = [b for b in share_of(batches, task) if any(job.key in missing for job in b)]
        if not share:
            return
        measured_by = column_digest(sorted(self.measures.columns.items()))
        bars = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*bars) as progress:
            bar = progress.add_task("evaluating", total=sum(map(len, share)))
            for batch in share:
                rows = self._rows_of(batch, generator, have)
                rows = [dict.fromkeys(self.measures.asked) | row for row in rows]
                # Of another batch size it must not take a part's place, which has other rows too.
                name = f"{batch[0].number:08d}-{len(batch)}-{measured_by}.parquet"
                write_rows(self.folder / PARTS / name, rows, columns)
                progress.advance(bar, len(batch))

    def _missing(self, have: dict[Key, Row]) -> set[Key]:
        """Lists the images to generate, to measure or, since more are wanted now, to keep."""
        return {
            job.key
            for job in self.jobs
            if IMAGE_COLUMN not in (row := have.get(job.key, {}))
            or self.measures.missing(row)
            or (row["file"] is None and self._is_kept(job))
        }

    def _rows_of(
        self, batch: Sequence[Job], generator: ImageGenerator, have: dict[Key, Row]
    ) -> list[Row]:
        """Returns the completed rows of a batch; keeps the first images as files."""
        rows: list[Row] = [dict(have.get(job.key, {})) for job in batch]
        is_new = any(IMAGE_COLUMN not in row for row in rows)
        started_s, generated, pixels = self._pictures(batch, generator, is_new)
        prompts = [job.prompt for job in batch]
        if is_new:
            luminances = luminance_rows(pixels, prompts)
            for row, job, measured in zip(rows, batch, luminances, strict=True):
                row |= job.columns | generator.formats | measured
        self._keep(batch, rows, pixels)
        wanted = set().union(*map(self.measures.missing, rows))
        for row, measured in zip(rows, self.measures.measure(pixels, prompts, wanted), strict=True):
            row |= measured
            for name, value in generated.items():
                row[name] = row.get(name) or value
        measured_s = (time.perf_counter() - started_s) / len(batch) - generated["sampling_s"]
        peak_gb = peak_bytes(generator.device) / GB
        for row in rows:
            row["measuring_s"] = round((row.get("measuring_s") or 0) + measured_s, 5)
            row["peak_gb"] = round(max(row.get("peak_gb") or 0, peak_gb), 4)
        return rows

    def _pictures(
        self, batch: Sequence[Job], generator: ImageGenerator, is_new: bool
    ) -> tuple[float, Row, Pixels]:
        """Returns the start time, each image's cost, and the images, generated or read."""
        files = [self.folder / job.file for job in batch]
        is_generated = is_new or not all(file.is_file() for file in files)
        if is_generated:
            _ = generator.model  # loaded: its seconds are not the batch's
        started_s, before = time.perf_counter(), generator.num_rows
        if is_generated:
            pixels = generator.generate(batch)
        else:
            pixels = torch.stack([pil_to_tensor(Image.open(file)).contiguous() for file in files])
        nfe = (generator.num_rows - before) / len(batch)
        sampling_s = round((time.perf_counter() - started_s) / len(batch), 5)
        return started_s, {"nfe": nfe, "sampling_s": sampling_s}, pixels

    def _keep(self, batch: Sequence[Job], rows: Sequence[Row], pixels: Pixels) -> None:
        for job, row, picture in zip(batch, rows, pixels, strict=True):
            if row["file"] is None and self._is_kept(job):
                row["file"] = job.file
                image = Image.fromarray(picture.permute(1, 2, 0).numpy())
                write_png(self.folder / job.file, image)

    def _is_kept(self, job: Job) -> bool:
        return self.num_kept is None or job.number < self.num_kept
