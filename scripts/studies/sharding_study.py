"""Memory of each process, whole models against shares.

python -m blackpoint.scripts.studies.sharding_study trains a UNet with random weights for two
steps in one process, in two of DDP and in two of trainer.strategy=fsdp, one image of 64 px each,
and notes in every process

- the bytes of its weights, gradients, optimizer states and average: exact;
- its largest resident set, less the one before the model was read: up to the end of the last step,
  and with the checkpoint written.

The C library gives freed memory back to the system at once (MALLOC_MMAP_THRESHOLD_, the same for
all rows): else the resident set also holds what it keeps, which is as large as a share.

A row is a command of its own, `row=NAME`. Writes docs/sharding.json and prints its table.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.sampling.runtime.memory import process_peak_bytes
from blackpoint.scripts.config import load, load_values
from blackpoint.scripts.measurements.full_architecture import write_photos
from blackpoint.scripts.measurements.make_random_base import Name, RandomBaseConfig, make
from blackpoint.scripts.stand_alone import describe_machine, run_script
from blackpoint.train.cluster.sharding import own_rows
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.ema import Ema
from blackpoint.train.run import train

MODULE = "blackpoint.scripts.studies.sharding_study"
ROWS: dict[str, dict[str, Any]] = {
    "one process": {"trainer.devices": 1},
    "ddp": {"trainer.devices": 2, "trainer.strategy": "ddp"},
    "fsdp": {"trainer.devices": 2, "trainer.strategy": "fsdp"},
}
PARTS = ("weights", "gradients", "states", "average")
PEAKS = ("peak_training", "peak_checkpoint")
MB = 1e6
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}


@dataclass
class ShardingConfig:
    """What is trained, and where the figures go."""

    architecture: Name = "medium"
    """Architecture of scripts/measurements/make_random_base.py."""
    output: str = "docs/sharding.json"
    """File of the figures."""
    work: str = "runs/sharding"
    """Folder for the base, the images and the runs."""
    row: Literal["", "one process", "ddp", "fsdp"] = ""
    """Train for this row alone; empty: all of them, each in processes of its own."""


class Memory(Callback):
    """Writes what this process holds after the last step, and its peaks: FOLDER/RANK.json."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, process_peak_bytes()
        self.figures: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        [optimizer] = trainer.optimizers
        [ema] = (one for one in trainer.callbacks if isinstance(one, Ema))  # type: ignore[attr-defined]
        assert ema._average_model is not None
        weights = list(pl_module.parameters())
        states = [value for state in optimizer.state.values() for value in state.values()]
        held: dict[str, Iterable[Tensor]] = {
            "weights": weights,
            "gradients": [weight.grad for weight in weights if weight.grad is not None],
            "states": states,
            "average": ema._average_model.module.parameters(),
        }
        self.figures = {name: size_of(tensors) for name, tensors in held.items()}
        self.figures["peak_training"] = process_peak_bytes() - self.before

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.figures["peak_checkpoint"] = process_peak_bytes() - self.before
        path = self.folder / f"{trainer.global_rank}.json"
        write_whole(path, json.dumps(self.figures))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of this process's rows."""
    return sum(own_rows(tensor).nbytes for tensor in tensors)


def train_row(config: ShardingConfig) -> None:
    """Trains two steps of one row, in the processes that Lightning starts."""
    work, folder = Path(config.work), Path(config.work) / config.row
    values = {
        "run_dir": str(folder / "run"),
        "checkpoint": str(work / "base"),
        "data.shards": str(work / "shards"),
        "data.resolution": 64,
        "data.num_workers": 0,
        "batch_size": ROWS[config.row]["trainer.devices"],
        "trainer.max_steps": 2,
        "trainer.log_every_steps": 1,
        "watch.weights_every_steps": 0,
        "preview.every_steps": 0,
        "wandb.enabled": False,
    }
    run = load_values(TrainConfig, values | ROWS[config.row], config.row)
    train(run, folder / "run", 0, [Memory(folder)])


def measure(config: ShardingConfig) -> None:
    """Measures every row in turn and writes them."""
    if config.row:
        train_row(config)
        return
    work = Path(config.work)
    if not (work / "base").exists():
        make(RandomBaseConfig(config.architecture, str(work / "base"), "float32"))
        write_photos(work / "photos")
        pack(PackConfig(source=str(work / "photos"), output=str(work / "shards")))
    rows = {}
    for name in ROWS:
        shutil.rmtree(work / name, ignore_errors=True)
        arguments = [f"row={name}", f"work={work}"]
        command = [sys.executable, "-m", MODULE, *arguments]
        if subprocess.run(command, env=os.environ | ALLOCATOR).returncode:
            raise RunFailed(f"{name}: the training failed; see above")
        files = sorted((work / name).glob("*.json"))
        rows[name] = [json.loads(file.read_text(encoding="ascii")) for file in files]
        shutil.rmtree(work / name)
    content = {"command": f"python -m {MODULE}", "architecture": config.architecture}
    content |= describe_machine() | {"rows": rows}
    write_whole(Path(config.output), json.dumps(content, indent=1) + "\n")
    print(table(rows))


def table(rows: dict[str, list[dict[str, int]]]) -> str:
    """Returns the rows in Markdown: of each process, in MB of 10^6 bytes."""
    columns = (*PARTS, *PEAKS)
    lines = [f"| MB | {' | '.join(name.replace('_', ', ') for name in columns)} |"]
    lines.append(f"|---|{'--:|' * len(columns)}")
    for name, processes in rows.items():
        for rank, figures in enumerate(processes):
            cells = " | ".join(f"{figures[column] / MB:.0f}" for column in columns)
            lines.append(f"| {name}, process {rank} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("sharding_study", lambda: measure(load(ShardingConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
