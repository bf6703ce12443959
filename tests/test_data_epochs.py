"""Laws of an epoch: every sample once, for any number of processes and workers, also resumed."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.batches import TrainingBatches, ValidationBatches
from blackpoint.data.index.index import Index
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from tests.data_images import write_folder

NUM_IMAGES = 30
BATCH_SIZE = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """30 images in four shards."""
    folder = tmp_path_factory.mktemp("packed")
    write_folder(folder / "in", NUM_IMAGES)
    pack(PackConfig(str(folder / "in"), str(folder / "out"), samples_per_shard=8))
    shards = Path(folder / "out")
    return Reader(Index(shards), find_shards(str(shards)), seed=3, resolution=16)


def steps(
    source: Reader, start: int, count: int, world_size: int, num_workers: int
) -> list[list[dict[str, Any]]]:
    """Returns, of each step, the batch of each process."""
    ranks = []
    for rank in range(world_size):
        batches = TrainingBatches(source, BATCH_SIZE, start, rank, world_size)
        loader = CaptionedImages._loader(batches, num_workers)
        ranks.append(list(itertools.islice(iter(loader), count)))
    return [list(step) for step in zip(*ranks, strict=True)]


def seen(steps: list[list[dict[str, Any]]]) -> list[tuple[int, int, int]]:
    """Lists (position, epoch, index) of every sample, a step's processes one after the other."""
    return [
        (int(position), int(epoch), int(index))
        for step in steps
        for batch in step
        for position, epoch, index in zip(
            batch["position"], batch["epoch"], batch["index"], strict=True
        )
    ]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_two_epochs_hold_every_sample_twice(
    world_size: int, num_workers: int, source: Reader
) -> None:
    # Resumed at sample 24, within the first epoch, with other processes; ended within the third.
    other = world_size % 3 + 1
    first = steps(source, 0, 4, world_size, num_workers)
    rest = steps(source, 4 * BATCH_SIZE, 7, other, (num_workers + 1) % 4)
    assert {len(batch["index"]) for step in first for batch in step} == {BATCH_SIZE // world_size}
    assert {len(step) for step in rest} == {other} and len(rest) == 7
    found = seen(first + rest)
    assert [position for position, _, _ in found] == list(range(11 * BATCH_SIZE))
    for epoch in range(2):
        counts = Counter(index for _, number, index in found if number == epoch)
        assert counts == dict.fromkeys(range(NUM_IMAGES), 1)
    begun = [index for _, number, index in found if number == 2]
    assert len(begun) == len(set(begun)) == 6


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_batch_may_hold_the_end_of_an_epoch_and_the_next_ones_begin(
    num_workers: int, source: Reader
) -> None:
    found = seen(steps(source, 27, 1, 3, num_workers))
    assert [epoch for _, epoch, _ in found] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_gives_each_process_as_many_batches(world_size: int, source: Reader) -> None:
    for num_images, num_workers in ((7, 0), (29, 1), (30, 3)):
        ranks = []
        for rank in range(world_size):
            batches = ValidationBatches(source, num_images, BATCH_SIZE, rank, world_size)
            loader = CaptionedImages._loader(batches, num_workers)
            ranks.append([batch["index"].tolist() for batch in loader])
        assert len({len(rank) for rank in ranks}) == 1
        indices = sorted(index for rank in ranks for batch in rank for index in batch)
        assert indices == list(range(num_images - num_images % world_size))
