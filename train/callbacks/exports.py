"""Exports while a run goes on, to choose among by eye: run_dir/exports/step_00000500.

Each is made from the checkpoint of its step, in its turn, so that a run that is killed between the
two makes it at its next start, and a resumed run leaves the exports of an unbroken one. They are
not compared with stock diffusers, which would take memory beside the training: that is for the last
one, run_dir/export.
"""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import remove_whole
from blackpoint.sampling.choices import Weights
from blackpoint.sampling.export.carried import REMEDY, check_carried
from blackpoint.sampling.export.export import export
from blackpoint.sampling.export.lora_card import client_note
from blackpoint.sampling.export.lora_export import export_lora
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.callbacks.checkpoints import checkpoint_steps
from blackpoint.train.callbacks.watch import Watch
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.first_process import note, say

FOLDER = "exports"
NAME = re.compile(r"step_(\d+)(\..+)?")


class StepExports(Checkpoint):
    """Exports every so many optimizer steps; in the first process, for which the others wait.

    A Checkpoint, which Lightning calls after all other callbacks, and in their order; it must come
    after the one that saves.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, watch: Watch) -> None:
        self.config, self.run_dir, self.watch = config, run_dir, watch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self.watch.paused():
                export_step(self.config, self.run_dir, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A run that has been asked to stop has no time; its next start makes up for it.
        if trainer.is_global_zero and self.watch.at_step_end and not trainer.should_stop:
            with self.watch.paused():
                export_step(self.config, self.run_dir, trainer.global_step)


def check_exports(config: TrainConfig, model: DiffusionModel) -> None:
    """Raises UserError where what the run is to export on its way can't hold the model."""
    options = config.export
    if not options.every_steps:
        return
    if reason := model.process.not_exported():
        raise UserError(
            f"export.every_steps={options.every_steps}: must be 0, for {reason}; sample the "
            "checkpoints with allow_unsound=true"
        )
    if options.format == "lora" and model.pixels is not None:
        raise UserError(
            f"export.format=lora: checkpoint={model.source} generates pixels, and no client takes "
            "adapters of such a model; use export.format=folder"
        )
    if options.format == "file":
        given = model
        if model.pixels is None:  # of its own: the run may do without the encoders that this reads
            given = DiffusionModel.load(
                model.source,
                with_unet=False,
                single_file=config.single_file,
                undecided=config.loss.prediction_type,
            )
            given.process = model.process
        try:
            check_carried(given, model.source)
        except UserError as error:
            reason = str(error).removesuffix(f"; {REMEDY}")
            raise UserError(f"export.format=file: {reason}; use export.format=folder") from None


def export_step(config: TrainConfig, run_dir: Path, step: int) -> None:
    """Exports the checkpoint of a step at which one is due, unless it is there; removes old ones.

    Raises what `export` raises.
    """
    options, folder = config.export, run_dir / FOLDER
    if not options.every_steps or not step or step % options.every_steps:
        return
    name = f"step_{step:08d}"
    output = folder / f"{name}{'.safetensors' if options.format == 'file' else ''}"
    if not output.exists():
        for beside in folder.glob(f"{name}.*"):  # of a single file that a kill cut off
            remove_whole(beside)
        checkpoint = checkpoint_steps(run_dir / "checkpoints")[step]
        weights: Weights = "ema" if config.ema.enabled else "raw"
        write = export_lora if options.format == "lora" else export
        write(checkpoint, output, weights=weights, verify=False)
        say(f"exported step {step} to {output}")
    steps = sorted({int(match[1]) for path in folder.iterdir() if (match := _match(path))})
    for path in list(folder.iterdir()):
        if (match := _match(path)) and int(match[1]) not in steps[-options.keep :]:
            remove_whole(path)


def write_adapters(checkpoint: Path, output: Path, weights: Weights) -> None:
    """Writes the files of a checkpoint's adapters, unless they are there, and what to know of them.

    Not those of a pixel-space model, which no client takes.
    """
    if output.exists():  # of a start that was killed before it wrote run_dir/export
        return
    if DiffusionModel.load(checkpoint, with_unet=False).pixels is None:
        note(client_note(export_lora(checkpoint, output, weights)))


def remove_partial_exports(run_dir: Path) -> None:
    """Removes what a kill has left half-written or half-removed; for who has the run directory."""
    for path in (run_dir / FOLDER).glob(".*"):
        remove_whole(path)


def _match(path: Path) -> re.Match[str] | None:
    return NAME.fullmatch(path.name)
