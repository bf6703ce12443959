"""The reader and the latent cache in the benchmark.

The reader takes turns with a bare loop that reads the same shards from front to back with tarfile
and decodes, resizes and crops with Pillow. It draws nothing reproducibly, permutes nothing, checks
nothing and resumes nowhere. Each in one process, on one thread.

Then runs of `train` in processes of their own: the share of time that a step waits for its batch,
with and without loader processes, and images/s from the cache, from images, and of two processes.
"""

import itertools
import json
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.index.index import Index
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from blackpoint.data.transform import crop_box
from blackpoint.scripts.bench.inputs import Inputs, training_config
from blackpoint.scripts.bench.timing import Row, Seconds, ratio_row, row, time_round
from blackpoint.train.config.config import TrainConfig

GROUP = "reader, one process"
RUNS = "runs of train, cache and processes"
OURS, BARE = "our reader", "bare tar loop"
IMAGES, CACHE, TWO, LOADERS = "images", "cache", "images, two processes", "images, two loaders"


def time_reader(config: TrainConfig, num_batches: int, rounds: int) -> Seconds:
    """Returns the seconds of each, one a round, for `num_batches` batches of the config's size."""
    assert config.data.shards is not None
    shards, size = find_shards(config.data.shards), config.data.resolution
    reader = Reader(Index(shards[0].parent), shards, config.seed, size, "random", True, 0.1)
    positions = itertools.count(step=config.batch_size)
    bare = _bare_batches(shards, size, config.batch_size)

    def ours() -> None:
        for first in itertools.islice(positions, num_batches):
            reader.batch(range(first, first + config.batch_size))

    def theirs() -> None:
        for _ in range(num_batches):
            next(bare)

    parts: dict[str, Callable[[], object]] = {OURS: ours, BARE: theirs}
    seconds: Seconds = {}
    time_round(parts, 0, {})
    for number in range(rounds):
        time_round(parts, number, seconds)
    return seconds


def reader_rows(seconds: Seconds, images: int) -> list[Row]:
    """Returns samples/s of both and ours over bare; `images` is the number in a round."""
    rows = [
        row(GROUP, name, "samples/s", [images / s for s in seconds[name]]) for name in (OURS, BARE)
    ]
    what = f"{OURS} / {BARE}"
    return [*rows, ratio_row(GROUP, what, seconds[BARE], seconds[OURS], at_least=0.95)]


def time_runs(yaml: str, inputs: Inputs, folder: Path, steps: int, rounds: int) -> list[dict]:
    """Returns images/s and the share of waiting of each run, a dict a round; all take turns."""
    changes: dict[str, dict[str, object]] = {
        IMAGES: {},
        CACHE: {"data.shards": str(inputs.encoded_shards)},
        TWO: {"trainer.devices": 2},
        LOADERS: {"data.num_workers": 2},
    }
    speeds_by_round = []
    for number in range(rounds):
        names = list(changes)
        first = number % len(names)
        speeds = {}
        for name in names[first:] + names[:first]:
            run_dir = folder / f"{number}_{names.index(name)}"
            task = {"yaml": yaml, "run_dir": str(run_dir), "steps": steps, **changes[name]}
            command = [sys.executable, "-m", "blackpoint.scripts.bench.reader", json.dumps(task)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RunFailed(f"a run of train on {name} failed:\n{result.stderr}")
            speeds[name] = json.loads((run_dir / "bench.json").read_text())
        speeds_by_round.append(speeds)
    return speeds_by_round


def run_rows(runs_by_round: list[dict]) -> list[Row]:
    """Returns images/s of each run, the share of waiting, and the two ratios."""
    speeds = {
        name: [runs[name]["images_per_s"] for runs in runs_by_round] for name in runs_by_round[0]
    }
    rows = [row(RUNS, name, "images/s", speeds[name]) for name in speeds]
    for name in (IMAGES, CACHE, LOADERS):
        waiting = [runs[name]["waiting_share"] for runs in runs_by_round]
        rows.append(row(RUNS, f"{name}: share of time waiting for data", "", waiting))
    rows.append(ratio_row(RUNS, "cache / images", speeds[CACHE], speeds[IMAGES]))
    rows.append(ratio_row(RUNS, "two processes / one", speeds[TWO], speeds[IMAGES]))
    return rows


def _bare_batches(shards: list[Path], size: int, batch_size: int) -> Iterator[torch.Tensor]:
    samples = _bare_samples(shards, size)
    while True:
        rows = [pixels.transpose(2, 0, 1) for pixels, _ in itertools.islice(samples, batch_size)]
        yield torch.from_numpy(np.stack(rows))


def _bare_samples(shards: list[Path], size: int) -> Iterator[tuple[np.ndarray, str]]:
    for shard in itertools.cycle(shards):
        with tarfile.open(shard) as tar:
            members: dict[str, bytes] = {}
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members[member.name.rpartition(".")[2]] = file.read()
                if len(members) == 2:
                    caption = members.pop("txt").decode().strip()
                    ((_, content),) = members.items()
                    members = {}
                    yield _bare_pixels(content, size), caption


def _bare_pixels(content: bytes, size: int) -> np.ndarray:
    image = Image.open(BytesIO(content)).convert("RGB")
    if image.size != (size, size):
        box = crop_box(*image.size, (size, size), random.random(), random.random())
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def _run(task: dict) -> None:
    """Trains and notes images/s and the waiting of the second half of the steps."""
    from lightning.pytorch import Callback

    from blackpoint.train.records.first_process import is_first_process
    from blackpoint.train.run import train

    yaml, run_dir, steps = task.pop("yaml"), Path(task.pop("run_dir")), task.pop("steps")
    config = training_config(yaml, run_dir, steps, **task)

    class Clock(Callback):
        started_s = ended_s = waited_s = 0.0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx > steps // 2:
                self.waited_s += time.perf_counter() - self.ended_s

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.ended_s = time.perf_counter()
            if batch_idx == steps // 2:
                self.started_s = self.ended_s

    clock = Clock()
    train(config, run_dir, 0, watchers=[clock])
    seconds = clock.ended_s - clock.started_s
    images = (steps - 1 - steps // 2) * config.batch_size
    result = {"images_per_s": images / seconds, "waiting_share": clock.waited_s / seconds}
    if is_first_process():
        (run_dir / "bench.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
