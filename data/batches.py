"""Global batches and each process's slice of them, read by several workers in one fixed order.

Batch g holds positions [start + g B, start + (g + 1) B); process r of R takes the r-th of R equal
slices. Worker w of W reads the batches w, w + W, ...; the loader asks its workers in turn, so the
order does not depend on W.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from blackpoint.data.files.errors import UserError
from blackpoint.data.mixed_reader import MixedReader
from blackpoint.data.order.buckets import Size
from blackpoint.data.reader import Place, Reader

Draw = Callable[[dict[str, Any]], Any]
"""What is drawn for the samples of a batch, as a function of it."""


def slice_size(batch_size: int, world_size: int) -> int:
    """Returns images per process and batch; raises UserError unless they are equally many."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size}: counts the images of all processes, so it must be a "
            f"positive multiple of their number, {world_size}"
        )
    return batch_size // world_size


class TrainingBatches(IterableDataset):
    """One process's training batches, without end."""

    def __init__(
        self,
        reader: Reader | MixedReader,
        batch_size: int,
        start_sample: int,
        rank: int,
        world_size: int,
        draw: Draw | None = None,
    ) -> None:
        self.reader = reader
        self.batch_size = batch_size
        self.draw = draw
        self.slice_size = slice_size(batch_size, world_size)
        self.start = start_sample + rank * self.slice_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        for number in itertools.count(worker, num_workers):
            first = self.start + number * self.batch_size
            batch = self.reader.batch(range(first, first + self.slice_size))
            yield batch if self.draw is None else batch | {"draws": self.draw(batch)}


class ValidationBatches(IterableDataset):
    """One process's share of the first `num_images` samples: no draws, always the same.

    All processes see equally many batches. Without buckets the number is lowered to a multiple of
    the processes; with them, batches, each of one bucket, are split for it.
    """

    def __init__(
        self, reader: Reader, num_images: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        size = slice_size(batch_size, world_size)
        self.reader = reader
        self.slices: Sequence[Sequence[int]]
        if reader.order is not None:
            self.slices = even_batches(_first_by_size(reader, num_images), size, world_size)[rank]
            return
        num_images = min(num_images, len(reader))
        num_images -= num_images % world_size
        numbers = range(rank, num_images, world_size)
        self.slices = [numbers[first : first + size] for first in range(0, len(numbers), size)]

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = _worker()
        for numbers in self.slices[worker::num_workers]:
            places = [Place(0, self.reader.sample_index(number), number) for number in numbers]
            yield self.reader.collate(places, training=False)


def even_batches(
    groups: Iterable[Sequence[int]], size: int, world_size: int
) -> list[list[Sequence[int]]]:
    """Returns each process's batches, of at most `size` samples of one group, equally many each.

    The largest batches are halved until the processes share them evenly; only where all hold one
    sample are the last ones left out.
    """
    batches = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        whole = batches[largest]
        if len(whole) == 1:
            del batches[-(len(batches) % world_size) :]
        else:
            half = len(whole) // 2
            batches[largest : largest + 1] = [whole[:half], whole[half:]]
    return [batches[rank::world_size] for rank in range(world_size)]


def _first_by_size(reader: Reader, num_images: int) -> list[list[int]]:
    """Returns the numbers of the first samples that are not left out, by size."""
    by_size: dict[Size, list[int]] = {}
    for number in range(len(reader)):
        size = reader.size(reader.sample_index(number))
        if size is not None:
            by_size.setdefault(size, []).append(number)
            num_images -= 1
        if not num_images:
            break
    return [by_size[size] for size in sorted(by_size)]


def _worker() -> tuple[int, int]:
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)
