"""Checkpoints of a run: `checkpoints/step_00000500.ckpt`, whole or not there at all.

They hold tensors and plain containers only, and are read with weights_only=True, mapped: a tensor
is read when it is copied to where it is used, and its pages of the file leave memory again.
"""

import ctypes
import mmap
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from train.watch import Watch

NAME = re.compile(r"step_(\d+)\.ckpt")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Returns the checkpoints in `folder` by their step, ascending."""
    found = {}
    for path in folder.glob("step_*.ckpt"):
        match = NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint beside its place, syncs it to disk and renames it; reads it mapped.

    Lightning's own first builds the whole file in memory, and loads with pickle allowed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: Any = True
    ) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class SaveCheckpoints(Checkpoint):
    """Saves every so many optimizer steps and at the last one, and keeps the newest few."""

    def __init__(self, folder: Path, every_steps: int, keep: int, watch: Watch) -> None:
        self.folder, self.every_steps, self.keep, self.watch = folder, every_steps, keep, watch
        self.saved_step = max(checkpoint_steps(folder), default=0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == trainer.max_steps or trainer.should_stop
        if not due or step == self.saved_step or not self.watch.at_step_end:
            return
        with self.watch.paused():
            trainer.save_checkpoint(self.folder / f"step_{step:08d}.ckpt")
            self.saved_step = step
            if trainer.is_global_zero:
                for path in list(checkpoint_steps(self.folder).values())[: -self.keep]:
                    path.unlink()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets go of the file: by now the module and its average hold copies of their weights.

        On a CPU the optimizer would go on with the mapped tensors, which keep the file's place on
        disk after its removal, so it gets copies, made one by one.
        """
        for state in (checkpoint["state_dict"], checkpoint.get("current_model_state", {})):
            for tensor in state.values():
                forget_pages(tensor)
        if trainer.strategy.root_device.type != "cpu":
            return
        for optimizer_state in checkpoint["optimizer_states"]:
            for values in optimizer_state["state"].values():
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        values[name] = value.clone()
                        forget_pages(value)


def forget_pages(mapped: Tensor) -> None:
    """Drops the pages of a tensor that maps a file, unwritten, from this process's memory (Linux).

    They are read again where the tensor is used again.
    """
    if sys.platform != "linux":
        return
    storage = mapped.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
