"""`python -m blackpoint.scripts.bench.draws`: what the random draws of a step cost its process.

Made in the step, they are its own work; made by a process that reads the data, all that is left is
to take them over. Both are timed on the CPU, on one thread: a call of the run's BatchDraws, and a
batch from a loader whose process has made all batches before, with the draws and without. Others
share the machine, so the fastest of all batches counts.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from blackpoint.sampling.report.page import Page
from blackpoint.sampling.schedule import SD_NUM_STEPS
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script
from blackpoint.train.draws import BatchDraws
from blackpoint.train.loss_config import LossConfig

CASES = {"SD 1.5, 512 px": (32, 64), "SDXL, 1024 px": (4, 128)}
"""Images of a batch, and the side of their latents of four channels."""
CHANNELS = 4


@dataclass
class DrawsBenchConfig:
    """How often it is timed."""

    num_batches: int = 100
    """Batches of each kind; all of them are held at once."""


class Batches(IterableDataset):
    """Batches of moments as training has them, with their draws if `draw` is given."""

    def __init__(self, size: int, side: int, num_batches: int, draw: BatchDraws | None) -> None:
        self.moments = torch.zeros(size, 2 * CHANNELS, side, side)
        self.num_batches, self.draw = num_batches, draw
        self.done: Event = multiprocessing.Event()

    def batch(self, number: int) -> dict[str, Any]:
        """Returns the batch of a number, without its draws."""
        size = len(self.moments)
        index = torch.arange(number * size, (number + 1) * size)
        places = {"index": index, "position": index, "epoch": torch.zeros(size, dtype=torch.int64)}
        return {"moments": self.moments, **places}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.num_batches):
            batch = self.batch(number)
            yield batch if self.draw is None else batch | {"draws": self.draw(batch)}
        self.done.set()


def seconds_to_draw(batches: Batches, draw: BatchDraws) -> list[float]:
    """Returns the seconds of each batch whose draws are made in this process."""
    seconds = []
    for number in range(batches.num_batches):
        batch = batches.batch(number)
        started_s = time.perf_counter()
        draw(batch)
        seconds.append(time.perf_counter() - started_s)
    return seconds


def seconds_to_take(batches: Batches) -> list[float]:
    """Returns the seconds of each batch that another process has made before."""
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=1,
        prefetch_factor=batches.num_batches + 1,
        multiprocessing_context="fork",
    )
    iterator, seconds = iter(loader), []
    batches.done.wait()
    for _ in range(batches.num_batches):
        started_s = time.perf_counter()
        next(iterator)
        seconds.append(time.perf_counter() - started_s)
    return seconds


def rows(settings: DrawsBenchConfig) -> list[dict[str, Any]]:
    """Returns a line of the table per case, in ms."""
    lines = []
    for name, (size, side) in CASES.items():
        draw = BatchDraws(0, SD_NUM_STEPS, LossConfig(), CHANNELS, 8, posterior=True, dropout=False)
        kinds = [Batches(size, side, settings.num_batches, given) for given in (None, draw)]
        plain, taken = (min(seconds_to_take(kind)) for kind in kinds)
        drawn = min(seconds_to_draw(kinds[0], draw))
        lines.append(
            {
                "latents": f"{name}: {size} x {CHANNELS} x {side} x {side}",
                "made in the step, ms": f"{1000 * drawn:.2f}",
                "added to a batch taken from a reader, ms": f"{1000 * (taken - plain):.2f}",
                "the rest of that batch, ms": f"{1000 * plain:.2f}",
            }
        )
    return lines


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    settings = load(DrawsBenchConfig, sys.argv[1:])
    print(Page("Draws", [Table(rows(settings))]).markdown())


if __name__ == "__main__":
    sys.exit(run_script("draws", main))
