"""Laws of size: neither memory nor the time to the first batch grows with data set or position."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackpoint.data.index.index import FORMAT_VERSION, INDEX_FOLDER, Index
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.reader import Reader
from blackpoint.data.record import RECORD
from tests.data_images import write_folder
from tests.waiting import PATIENCE_S

NUM_SHARDS = 100
BATCH = 8
FAR = 10**6
MEGABYTE = 1 << 20


def open_reader(folder: Path) -> Reader:
    shards = [folder / f"{number:03d}.tar" for number in range(NUM_SHARDS)]
    return Reader(Index(folder), shards, seed=5, resolution=16)


def places_read() -> list[int]:
    near, far = range(BATCH), range(FAR, FAR + BATCH)
    return [*near, *far, *(int(n) for n in np.random.default_rng(0).integers(0, 10**8, 400))]


def make(folder: Path, packed: Path, num_samples: int) -> Path:
    """Writes a data set of so many samples whose files have holes where no test reads.

    Samples that are read lie where they would; all are copies of one of few images.
    """
    real = Index(packed)
    (folder / INDEX_FOLDER).mkdir(parents=True)
    shard = (packed / real.shard_names[0]).read_bytes()
    for number in range(NUM_SHARDS):
        (folder / f"{number:03d}.tar").write_bytes(shard)
    each = num_samples // NUM_SHARDS
    shards = [
        {"name": f"{number:03d}.tar", "bytes": len(shard), "num_samples": each}
        for number in range(NUM_SHARDS)
    ]
    description = {"version": FORMAT_VERSION, "num_samples": num_samples, "num_bad_samples": 0}
    text = json.dumps(description | {"shards": shards})
    (folder / INDEX_FOLDER / "shards.json").write_text(text)
    (folder / INDEX_FOLDER / "keys.bin").touch()
    os.truncate(folder / INDEX_FOLDER / "keys.bin", 12 * num_samples)
    header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(RECORD)}
    header |= {"fortran_order": False, "shape": (num_samples,)}
    with (folder / INDEX_FOLDER / "records.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + num_samples * RECORD.itemsize)
        reader = open_reader(folder)
        for position in places_read():
            index = reader.place(position).index
            record = np.array([real.record(index % len(real))], RECORD)
            record["shard"], record["key_offset"] = index // each, 12 * index
            os.pwrite(file.fileno(), record.tobytes(), start + index * RECORD.itemsize)
    return folder


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("scale")
    write_folder(folder / "in", 8)
    pack(PackConfig(str(folder / "in"), str(folder / "packed")))
    return {10**power: make(folder / str(power), folder / "packed", 10**power) for power in (4, 7)}


def memory() -> dict[str, int]:
    """Returns this process's anonymous memory, and its peak of all memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM")}


def in_a_process(job: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `job` returns in a fork of this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(job(*arguments)))
    process.start()
    assert receiver.poll(PATIENCE_S), "the process hangs or has died"
    result = receiver.recv()
    process.join()
    return result


def growth(folder: Path) -> dict[str, int]:
    """Reads places all over a data set and returns by how much memory grew."""
    before = memory()
    reader = open_reader(folder)
    places = places_read()
    for first in range(0, len(places), BATCH):
        batch = reader.batch(places[first : first + BATCH])
        assert not batch["replaced"] and batch["image"].shape[0] == BATCH
    return {name: after - before[name] for name, after in memory().items()}


def test_memory_is_flat_from_ten_thousand_to_ten_million(data_sets: dict[int, Path]) -> None:
    in_a_process(growth, data_sets[10**4])  # brings the modules' files into the page cache
    small = in_a_process(growth, data_sets[10**4])
    large = in_a_process(growth, data_sets[10**7])
    for name in small:
        # The index of 10^7 samples has 520 MB; a map of it that is read would show up here.
        assert large[name] < small[name] + 4 * MEGABYTE, (small, large)


def first_batch(folder: Path, position: int) -> tuple[float, int]:
    """Returns the seconds from nothing open to the batch at `position`, and the reads it took."""
    reads, pread = [0], os.pread

    def counted(*arguments: int) -> bytes:
        reads[0] += 1
        return pread(*arguments)

    os.pread = counted  # type: ignore[assignment]
    try:
        begin = time.thread_time()  # what else the machine does costs other threads
        batch = open_reader(folder).batch(range(position, position + BATCH))
        seconds = time.thread_time() - begin
    finally:
        os.pread = pread
    assert not batch["replaced"]
    return seconds, reads[0]


def test_the_first_batch_costs_the_same_everywhere(data_sets: dict[int, Path]) -> None:
    cases = [(size, position) for size in data_sets for position in (0, FAR)]
    best = dict.fromkeys(cases, float("inf"))
    num_reads = set()
    for attempt in range(100):
        for case in cases:
            seconds, reads = first_batch(data_sets[case[0]], case[1])
            best[case] = min(best[case], seconds)
            num_reads.add(reads)
        # Caches that others fill only add: the minima come together, if they do, in the end.
        if attempt >= 5 and max(best.values()) <= 1.2 * best[10**4, 0]:
            break
    else:
        pytest.fail(f"seconds to the first batch by (samples, position): {best}")
    # Record, key, image and caption of each sample, and not one read more.
    assert len(num_reads) == 1 and num_reads.pop() <= 6 * BATCH
