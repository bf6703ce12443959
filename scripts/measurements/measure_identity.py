"""`python -m blackpoint.scripts.measurements.measure_identity`: what it costs to know that a data
set is unchanged.

Two data sets of made-up shards, in a folder that is removed afterwards. One has many small shards:
what identity adds to the start of a run, which asks for the size and time of each. The other has
shards of full size: what a GB costs where headers and captions are compared, where all bytes are,
and where an index is written, which decodes every image. Each is measured with the shards in memory
and, where the system drops them from it, on the disk. Writes docs/identity_cost.md and .json.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.identity import identity
from blackpoint.data.index.contents import STAMPS_FILE
from blackpoint.data.index.index import INDEX_FOLDER, Index, IndexWriter, build_index
from blackpoint.data.index.shard_set import ShardSet, open_shards
from blackpoint.data.index.verify import compare_bytes, verify
from blackpoint.data.reader import Reader
from blackpoint.data.record import ShardRecords
from blackpoint.data.shards.shard_digest import file_stamp
from blackpoint.data.shards.shard_file import ShardFile, shard_name
from blackpoint.sampling.report.page import Page
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script, write_page

LONG_AGO = (1e9, 1e9)
GB = 1e9
CAPTION = (
    b"a photo of something that someone has seen somewhere, in words of the usual number, 100 bytes"
)


@dataclass
class IdentityCostConfig:
    """How large the two data sets are."""

    num_shards: int = 10_000
    """Small shards, of two samples each."""
    gigabytes: float = 1.0
    """Size of the full shards, in 10^9 bytes."""
    num_full_shards: int = 4
    """Full shards."""
    image_side_px: int = 300
    """Side of the noisy JPEGs of the full shards."""
    repeats: int = 5
    """Times that each is measured; the median counts."""
    folder: str | None = None
    """Where the data sets are made; null: the system's folder for temporary files."""
    output: str = "docs/identity_cost"
    """The two files to write, without .md and .json."""

    def __post_init__(self) -> None:
        if min(self.num_shards, self.num_full_shards, self.repeats) < 1:
            raise UserError("num_shards, num_full_shards and repeats: must be at least 1")


def measure(config: IdentityCostConfig) -> dict[str, Any]:
    """Returns seconds and sizes by what was done."""
    folder = Path(tempfile.mkdtemp(prefix="identity-", dir=config.folder))
    try:
        results = {**describe_machine(), "settings": vars(config), "load": os.getloadavg()[1]}
        many = make_many(folder / "many", config.num_shards)
        results["start"] = measure_start(many, config.repeats)
        shards = make_full(folder / "full", config)
        results["gigabyte"] = measure_gigabyte(shards, config.repeats)
    finally:
        shutil.rmtree(folder)
    return results


def make_many(folder: Path, num_shards: int) -> Path:
    """Writes copies of one small shard, and their index."""
    folder.mkdir()
    paths = [folder / shard_name(number) for number in range(num_shards)]
    records, shard = ShardRecords(), ShardFile(paths[0])
    for key in ("0", "1"):
        write_sample(shard, records, key, jpeg(np.random.default_rng(int(key)), 16), 16)
    content = shard.close()
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)
    for path in paths:
        os.utime(path, LONG_AGO)
    with IndexWriter(folder) as index:
        for path in paths:
            stamp = file_stamp(path.stat())
            index.append(path.name, records, content._replace(stamp=stamp))
        index.close()
    return folder


def make_full(folder: Path, config: IdentityCostConfig) -> ShardSet:
    """Writes full shards of noisy images, a few of them over and over."""
    folder.mkdir()
    rng, side = np.random.default_rng(0), config.image_side_px
    images = [jpeg(rng, side) for _ in range(16)]
    for number in range(config.num_full_shards):
        shard, records = ShardFile(folder / shard_name(number)), ShardRecords()
        while shard.offset < config.gigabytes * GB / config.num_full_shards:
            write_sample(shard, records, f"{len(records):09d}", images[len(records) % 16], side)
        shard.close()
        os.utime(folder / shard_name(number), LONG_AGO)
    return opened(folder)


def measure_start(folder: Path, repeats: int) -> dict[str, float]:
    """Returns the seconds of each part of a start on unchanged shards."""
    paths = opened(folder).paths
    reader = Reader(Index(folder), paths, seed=0, resolution=16)
    return {
        "find the shards, as before": timed(lambda: opened(folder), repeats),
        "ask for sizes alone, as before": timed(
            lambda: [os.stat(p).st_size for p in paths], repeats
        ),
        "compare sizes and times": timed(lambda: Index(folder).check_shards(paths), repeats),
        "identity of the run's data": timed(lambda: json.dumps(identity(reader)), repeats),
    }


def measure_gigabyte(shards: ShardSet, repeats: int) -> dict[str, Any]:
    """Returns seconds per GB of each level, in memory and on the disk."""
    total = sum(path.stat().st_size for path in shards.paths) / GB

    def index_anew() -> None:
        shutil.rmtree(shards.folder / INDEX_FOLDER, ignore_errors=True)
        build_index(shards.folder)

    def forget_stamps() -> None:
        (shards.folder / INDEX_FOLDER / STAMPS_FILE).unlink(missing_ok=True)

    def forget_all() -> None:
        forget_stamps()
        for path in shards.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    indexing_s = timed(index_anew, 1) / total
    index = Index(shards.folder)
    rows = index.records
    levels: dict[str, Callable[[], Any]] = {
        "headers and captions": lambda: verify(shards),
        "all bytes": lambda: compare_bytes(index, shards.paths),
    }
    seconds: dict[str, Any] = {"index": {"memory": indexing_s}}
    for name, level in levels.items():
        seconds[name] = {
            "memory": timed(level, repeats, forget_stamps) / total,
            "disk": timed(level, repeats, forget_all) / total,
        }
        verify(shards)
    sizes = rows["image_size"].astype(np.int64)
    return {
        "seconds": seconds,
        "gigabytes": total,
        "num_samples": len(rows),
        "text_share": 1 - float(sizes.sum()) / (total * GB),
    }


def markdown(results: dict[str, Any]) -> str:
    """Returns the page."""
    start, full, settings = results["start"], results["gigabyte"], results["settings"]
    kb = full["gigabytes"] * 1e6 / full["num_samples"]
    titles = {"index": "write the index (decodes; one process)"}
    levels = [
        (
            titles.get(name, f"compare {name}"),
            seconds["memory"],
            seconds.get("disk"),
            seconds["disk"] * 1000 / 60 if "disk" in seconds else None,
        )
        for name, seconds in full["seconds"].items()
    ]
    columns = {"": "", "s per GB, in memory": ".2f", "s per GB, on the disk": ".2f"}
    return Page(
        "What identity costs",
        [
            f"`python -m blackpoint.scripts.measurements.measure_identity` on "
            f"{results['date']} ({results['machine']}), "
            f"beside other work: a load of {results['load']:.0f}.",
            f"The start of a run on {settings['num_shards']:,} unchanged shards, on a local disk; "
            f"medians of {settings['repeats']}:",
            Table.of({"": "", "s": ".3f"}, start.items()),
            f"Shards of {kb:.0f} kB per sample, of which {full['text_share']:.1%} are headers and "
            "captions:",
            Table.of(columns | {"minutes per TB, on the disk": ".0f"}, levels),
        ],
    ).markdown()


def jpeg(rng: np.random.Generator, side: int) -> bytes:
    """Returns a noisy JPEG."""
    buffer = BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_sample(
    shard: ShardFile, records: ShardRecords, key: str, image: bytes, side: int
) -> None:
    """Appends a sample to a shard and its records."""
    spans = shard.write(key, {"jpg": image, "txt": CAPTION})
    records.add(key, spans["jpg"], spans["txt"], side, side, 0.5)


def opened(folder: Path) -> ShardSet:
    """Finds the shards of a folder as a training does."""
    return open_shards(str(folder), "data.shards", DataConfig(str(folder)))


def timed(
    function: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None
) -> float:
    """Returns the median seconds of some calls."""
    seconds = []
    for _ in range(repeats):
        before()
        begun_s = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun_s)
    return statistics.median(seconds)


def write(config: IdentityCostConfig) -> None:
    """Measures, writes both files and prints the page."""
    results = measure(config)
    write_page(config.output, markdown(results), results)


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("measure_identity", lambda: write(load(IdentityCostConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
