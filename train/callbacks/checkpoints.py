"""Checkpoints of a run: `checkpoints/step_00000500.ckpt`, whole or not there at all.

They hold tensors and plain containers only, and are read with weights_only=True, mapped: a tensor
is read when it is copied to where it is used, and its pages of the file leave memory again. A disk
may still lose what it has promised to keep, so a file is checked, record by record, before a run
goes on from it. The newest few are kept, and the best: best.json says which that is.
"""

import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.whole_file import remove_whole, whole_file, write_whole
from blackpoint.sampling.checkpoints.loading import SHARDED_STATE, forget_pages, read_ckpt
from blackpoint.train.callbacks.validation import ValidationLoss
from blackpoint.train.callbacks.watch import Watch
from blackpoint.train.cluster.sharding import SHARES, damaged_share, is_sharded, write_shares

NAME = re.compile(r"step_(\d+)\.ckpt")
BEST = "best.json"


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """Returns the checkpoints in `folder` by their step, ascending."""
    paths = {}
    for path in folder.glob("step_*.ckpt"):
        match = NAME.fullmatch(path.name)
        if match:
            paths[int(match[1])] = path
    return dict(sorted(paths.items()))


def read_best(folder: Path) -> tuple[int, float] | None:
    """Returns step and validation loss of the best checkpoint so far, or None."""
    try:
        best = json.loads((folder / BEST).read_text(encoding="ascii"))
        return int(best["step"]), float(best["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_partial_files(folder: Path) -> None:
    """Removes half-written files of a kill; for the process that has the run directory."""
    for path in folder.glob(".*.tmp"):
        remove_whole(path)


def remove_old(folder: Path, step: int, keep: int) -> None:
    """Removes all but the newest, up to `step`, and the best; later ones are damaged."""
    paths, best = checkpoint_steps(folder), read_best(folder)
    newest = [saved for saved in paths if saved <= step][-keep:]
    for saved, path in paths.items():
        if saved not in newest and (best is None or saved != best[0]):
            remove_whole(path)


def latest_valid_checkpoint(folder: Path) -> int:
    """Returns the step of the newest checkpoint that is not damaged; 0 without any.

    Says which ones are damaged; raises UserError if all are.
    """
    damaged: list[Path] = []
    for step, path in reversed(checkpoint_steps(folder).items()):
        reason = damage(path)
        if reason is None:
            if damaged:
                print(f"WARNING: going on from step {step}, {path}", file=sys.stderr, flush=True)
            return step
        print(f"WARNING: {path} is damaged: {reason}", file=sys.stderr, flush=True)
        damaged.append(path)
    if damaged:
        raise UserError(
            f"run_dir={folder.parent}: every checkpoint is damaged ({len(damaged)}, newest "
            f"{damaged[0].name}); remove {folder} to train from the start again"
        )
    return 0


def damage(path: Path) -> str | None:
    """Returns the damage of a checkpoint, by the checksums of its records, or None."""
    try:
        if path.is_dir():
            return damage(path / SHARDED_STATE) or damaged_share(path)
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return bad and f"record {bad} has changed since it was written"
    except Exception as error:
        # Damaged headers make zipfile raise almost anything: RuntimeError for a file that seems
        # encrypted, UnicodeDecodeError for a name. No fault in one file may hide the one before.
        return str(error) or type(error).__name__


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint beside its place, syncs it to disk and renames it; reads it mapped.

    Lightning's own first builds the whole file in memory, and loads with pickle allowed. One that
    is sharded is a folder, which all processes write.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if is_sharded(checkpoint):
                write_shares(checkpoint, path)
            else:
                if path.is_dir():  # damaged, of the same step
                    remove_whole(path)
                with whole_file(path, sync=True) as unfinished, unfinished.open("wb") as file:
                    torch.save(checkpoint, file)
            _flush_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch turns the system's error into its own
            reason = error if isinstance(error, OSError) else error.__cause__ or error.__context__
            if not isinstance(reason, OSError):
                raise
            kept = max(checkpoint_steps(path.parent), default=None)
            raise RunFailed(
                f"{path} can't be written: {reason.strerror}; "
                + (f"step {kept} is kept there; " if kept is not None else "")
                + "make room or restore the rights; the same command continues"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: Any = True
    ) -> dict[str, Any]:
        return read_ckpt(Path(path), "")


class SaveCheckpoints(Checkpoint):
    """Saves every so many optimizer steps and at the last one; keeps the newest few and the best.

    `every_steps` are several such intervals; those of 0 are none.

    The best is the one of the lowest validation loss, in the network's own output, of those saved
    at a step that was validated.
    """

    def __init__(
        self,
        folder: Path,
        every_steps: tuple[int, ...],
        keep: int,
        watch: Watch,
        validation: ValidationLoss | None = None,
        resume_step: int = 0,
    ) -> None:
        self.folder, self.every_steps, self.keep, self.watch = folder, every_steps, keep, watch
        self.validation = validation
        self.saved_step = resume_step
        self.best = read_best(folder)
        if self.best is not None and self.best[0] > resume_step:
            self.best = None  # of a checkpoint that was lost: the run comes by there again

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = any(step % interval == 0 for interval in self.every_steps if interval)
        due = due or step == trainer.max_steps or trainer.should_stop
        if not due or step == self.saved_step or not self.watch.at_step_end:
            return
        with self.watch.paused():
            if trainer.is_global_zero:
                self._note_best(step)  # first: of a step that is saved, no later start measures it
            trainer.save_checkpoint(self.folder / f"step_{step:08d}.ckpt")
            self.saved_step = step
            if trainer.is_global_zero:
                remove_old(self.folder, step, self.keep)

    def _note_best(self, step: int) -> None:
        measured = self.validation.measured if self.validation else None
        if measured is None or measured[0] != step:
            return
        if self.best is None or measured[1] < self.best[1]:
            self.best = measured
            text = json.dumps({"step": step, "validation_loss": measured[1]})
            write_whole(self.folder / BEST, text + "\n")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets go of the file: by now the module and its average hold copies of their weights.

        On a CPU the optimizer would go on with the mapped tensors, which keep the file's place on
        disk after its removal, so it gets copies, made one by one. Shares are copies already.
        """
        if SHARES in checkpoint:
            return
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


def _flush_folder(folder: Path) -> None:
    """Waits until a rename in `folder` is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
