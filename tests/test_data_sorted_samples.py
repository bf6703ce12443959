"""Laws of sorted samples: written once, found again, made anew if damaged, in flat memory."""

import json
import os
import pickle
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blackpoint.data.order.sorted_samples as module_of
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.index.index import INDEX_FOLDER, Index
from blackpoint.data.module import CaptionedImages
from blackpoint.data.order.buckets import BucketsConfig, bucket_table
from blackpoint.data.order.order import BucketOrder
from blackpoint.data.order.sorted_samples import sorted_samples
from blackpoint.data.record import RECORD
from tests.test_data_buckets import ON, write_images


def test_sorted_samples_are_written_once_beside_the_index_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_images(tmp_path, 20)
    table = bucket_table(ON["buckets"], 16, 1.0)
    first = sorted_samples(Index(shards), [range(20)], table)
    assert first.path.parent == shards / INDEX_FOLDER
    again = sorted_samples(Index(shards), [range(20)], table)
    assert again.path == first.path and first.path.stat() == again.path.stat()
    other = sorted_samples(Index(shards), [range(4, 12)], table)
    assert other.path != first.path and sum(other.counts) + other.num_left_out == 8

    found = [
        [first.index(bucket, place) for place in range(count)]
        for bucket, count in enumerate([*first.counts, first.num_left_out])
    ]
    records = Index(shards).records
    numbers = table.assign(records["width"], records["height"])
    assert found == [np.flatnonzero(numbers == n).tolist() for n in range(len(found))]
    assert len(pickle.dumps(first)) < 5_000

    content = first.path.read_bytes()
    first.path.write_bytes(content[:-4])  # a crash, or a full disk
    sorted_samples(Index(shards), [range(20)], table)
    assert first.path.read_bytes() == content

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first.path.unlink()
    write = module_of._write

    def refuse(path: Path, *arguments: Any) -> None:
        if path.parent.name == INDEX_FOLDER:
            raise PermissionError(13, "Permission denied")
        write(path, *arguments)

    monkeypatch.setattr(module_of, "_write", refuse)
    cached = sorted_samples(Index(shards), [range(20)], table)
    assert cached.path.parent == tmp_path / "cache" / "blackpoint"
    assert cached.path.read_bytes() == content
    monkeypatch.setattr(module_of, "_write", lambda *_: os.stat("/nowhere"))
    with pytest.raises(UserError, match="nor the cache can be written to .*set data.cache_dir"):
        sorted_samples(Index(shards), [range(3)], table)


def test_read_only_shards_and_an_unwritable_home_need_only_data_cache_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, cache = write_images(tmp_path, 20), tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write = module_of._write

    def refuse(path: Path, *arguments: Any) -> None:
        if not path.is_relative_to(cache):
            raise OSError(30, "Read-only file system")
        write(path, *arguments)

    monkeypatch.setattr(module_of, "_write", refuse)
    options = {"num_workers": 0, "cache_dir": str(cache), **ON}
    images = CaptionedImages(DataConfig(str(shards), resolution=16, **options), 3, batch_size=4)
    images.prepare_data()
    images.setup("fit")
    assert len(next(iter(images.train_dataloader()))["key"]) == 4
    assert [path.parent for path in tmp_path.rglob("sorted-*.bin")] == [cache]


def synthetic_index(folder: Path, num_samples: int) -> Index:
    """Writes an index of images of many sizes, without shards."""
    (folder / INDEX_FOLDER).mkdir(parents=True)
    rng = np.random.default_rng(0)
    chunk = np.zeros(100_000, RECORD)
    with (folder / INDEX_FOLDER / "records.npy").open("wb") as file:
        header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(RECORD)}
        header |= {"fortran_order": False, "shape": (num_samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(num_samples // len(chunk)):
            chunk["width"] = rng.integers(300, 3000, len(chunk))
            chunk["height"] = rng.integers(300, 3000, len(chunk))
            file.write(chunk.tobytes())
    (folder / INDEX_FOLDER / "keys.bin").write_bytes(b"")
    description = {"version": 1, "num_samples": num_samples, "num_bad_samples": 0, "shards": []}
    (folder / INDEX_FOLDER / "shards.json").write_text(json.dumps(description))
    return Index(folder)


@pytest.mark.slow
def test_memory_is_flat_up_to_ten_million_samples(tmp_path: Path) -> None:
    table = bucket_table(BucketsConfig(), 512, None)

    def peak_megabytes() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    sorted_samples(synthetic_index(tmp_path / "small", 100_000), [range(100_000)], table)
    before = peak_megabytes()
    index = synthetic_index(tmp_path / "large", 10_000_000)
    begun = time.perf_counter()
    found = sorted_samples(index, [range(10_000_000)], table)
    print(f"sorted 10^7 samples in {time.perf_counter() - begun:.1f} s")
    assert sum(found.counts) == 10_000_000
    assert len(pickle.dumps(found)) < 5_000
    whole = BucketOrder(found, 0, 256)
    assert len({whole.place(position).index for position in range(2_560)}) == 2_560
    assert peak_megabytes() < before + 20
