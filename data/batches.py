"""Global batches and each process's slice of them, read by several workers in one fixed order.

Batch g holds positions [start + g B, start + (g + 1) B); process r of R takes the r-th of R equal
slices. Worker w of W reads the batches w, w + W, ...; the loader asks its workers in turn, so the
order does not depend on W.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from data.errors import UserError
from data.reader import Place, Reader


def slice_size(batch_size: int, world_size: int) -> int:
    """Returns images per process and batch; raises UserError unless they are equally many."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size}: counts the images of all processes, so it must be a "
            f"positive multiple of their number, {world_size}."
        )
    return batch_size // world_size


class TrainingBatches(IterableDataset):
    """One process's training batches, without end."""

    def __init__(
        self, reader: Reader, batch_size: int, start_sample: int, rank: int, world_size: int
    ) -> None:
        self.reader = reader
        self.batch_size = batch_size
        self.slice_size = slice_size(batch_size, world_size)
        self.start = start_sample + rank * self.slice_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        for number in itertools.count(worker, num_workers):
            first = self.start + number * self.batch_size
            yield self.reader.batch(range(first, first + self.slice_size))


class ValidationBatches(IterableDataset):
    """One process's share of the first `num_images` samples: no draws, always the same.

    The number is lowered to a multiple of the processes, so that all see equally many batches.
    """

    def __init__(
        self, reader: Reader, num_images: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        num_images = min(num_images, len(reader))
        num_images -= num_images % world_size
        size = slice_size(batch_size, world_size)
        own = range(rank, num_images, world_size)
        self.reader = reader
        self.slices = [own[first : first + size] for first in range(0, len(own), size)]

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        for numbers in self.slices[worker::num_workers]:
            places = [Place(0, self.reader.sample_index(number), number) for number in numbers]
            yield self.reader.collate(places, training=False)


def _worker() -> tuple[int, int]:
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)
