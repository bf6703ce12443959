"""The samples of a data set sorted by bucket, in a file: which sample is the k-th of bucket b.

The file holds, as int64, (number of images, number enlarged) of each bucket and of what is left
out, and then the samples' indices as uint32, bucket by bucket, in the order of the index. It is
written once, beside the index or, where that can't be written to, in the cache folder, under a
digest of all that it depends on. Both writing and reading take the same memory for any number of
samples.
"""

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import whole_file
from blackpoint.data.index.index import INDEX_FOLDER, Index
from blackpoint.data.order.buckets import Buckets
from blackpoint.data.shards.options import cache_folder

FORMAT_VERSION = 1
CHUNK_SAMPLES = 1 << 16
COUNT, INDEX = np.dtype("<i8"), np.dtype("<u4")


class SortedSamples:
    """A file of sorted samples, opened on first use, in each process for itself."""

    def __init__(self, path: Path, buckets: Buckets) -> None:
        self.path, self.buckets = path, buckets
        header = np.fromfile(path, COUNT, 2 * _num_rows(buckets)).reshape(-1, 2).tolist()
        self.counts: list[int] = [count for count, _ in header[:-1]]
        self.num_enlarged: list[int] = [enlarged for _, enlarged in header[:-1]]
        self.num_left_out: int = header[-1][0]
        self._starts = np.cumsum([0, *self.counts]).tolist()
        self._file: int | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    def index(self, bucket: int, position: int) -> int:
        """Returns the sample at `place` of a bucket; bucket len(sizes) holds those left out.

        Places beyond a bucket's own are those of the buckets that follow.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        start = _header_bytes(self.buckets) + INDEX.itemsize * (self._starts[bucket] + position)
        return int.from_bytes(os.pread(self._file, INDEX.itemsize, start), "little")

    def left_out(self, most: int) -> list[int]:
        """Returns the first `most` samples that are left out."""
        number = len(self.buckets.sizes)
        return [self.index(number, position) for position in range(min(most, self.num_left_out))]

    def __del__(self) -> None:
        if self.__dict__.get("_file") is not None:
            os.close(self.__dict__["_file"])


def sorted_samples(
    index: Index, chosen: Sequence[range], buckets: Buckets, cache_dir: str | None = None
) -> SortedSamples:
    """Returns the sorted samples of the `chosen` ranges of an index, written first if need be.

    Raises UserError where neither the index's folder nor the cache can be written to.
    """
    chosen = sorted((samples for samples in chosen if samples), key=lambda samples: samples.start)
    name = f"sorted-{_digest(index, chosen, buckets)}.bin"
    folders = [index.shard_folder / INDEX_FOLDER, cache_folder(cache_dir)]
    for folder in folders:
        if samples := _opened(folder / name, buckets):
            return samples
    problem = ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / name, index, chosen, buckets)
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
            continue
        return SortedSamples(folder / name, buckets)
    raise UserError(
        f"data.buckets: neither {folders[0]} nor the cache can be written to ({problem}); "
        "set data.cache_dir to a folder with space"
    )


def _write(path: Path, index: Index, chosen: Sequence[range], buckets: Buckets) -> None:
    """Counts and then places, a chunk at a time: a counting sort whose target is the file."""
    header = np.zeros((_num_rows(buckets), 2), COUNT)
    for _, numbers, enlarged in _chunks(index, chosen, buckets):
        header[:, 0] += np.bincount(numbers, minlength=len(header))
        header[:, 1] += np.bincount(numbers[enlarged], minlength=len(header))
    following = np.cumsum([0, *header[:-1, 0]]).tolist()
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(header.tobytes())
        for start, numbers, _ in _chunks(index, chosen, buckets):
            order = np.argsort(numbers, kind="stable")
            indices = (start + order).astype(INDEX)
            counts = np.bincount(numbers, minlength=len(header)).tolist()
            for bucket, samples in enumerate(np.split(indices, np.cumsum(counts[:-1]))):
                file.seek(_header_bytes(buckets) + INDEX.itemsize * following[bucket])
                file.write(samples.tobytes())
                following[bucket] += len(samples)


def _chunks(
    index: Index, chosen: Sequence[range], buckets: Buckets
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields the first sample of each chunk, its samples' buckets, and which are enlarged."""
    for samples in chosen:
        for start in range(samples.start, samples.stop, CHUNK_SAMPLES):
            records = index.read(start, min(start + CHUNK_SAMPLES, samples.stop))
            widths, heights = records["width"], records["height"]
            numbers = buckets.assign(widths, heights)
            yield start, numbers, buckets.is_enlarged(widths, heights, numbers)


def _digest(index: Index, chosen: Sequence[range], buckets: Buckets) -> str:
    folder = index.shard_folder / INDEX_FOLDER
    records = (folder / "records.npy").stat()
    parts = [
        FORMAT_VERSION,
        buckets.sizes,
        buckets.max_upscale,
        [(samples.start, samples.stop) for samples in chosen],
        (folder / "shards.json").read_text(),
        # An index that was built anew may differ in nothing else that is quick to read.
        (records.st_size, records.st_mtime_ns),
    ]
    return blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def _opened(path: Path, buckets: Buckets) -> SortedSamples | None:
    """Opens a file that is there and whole; else None."""
    try:
        samples, size = SortedSamples(path, buckets), path.stat().st_size
    except (OSError, ValueError):
        return None
    num_samples = sum(samples.counts) + samples.num_left_out
    is_whole = size == _header_bytes(buckets) + INDEX.itemsize * num_samples
    return samples if is_whole else None


def _num_rows(buckets: Buckets) -> int:
    return len(buckets.sizes) + 1


def _header_bytes(buckets: Buckets) -> int:
    return 2 * COUNT.itemsize * _num_rows(buckets)
