"""The model that a run starts from: a checkpoint, or a pixel-space model made for the run."""

from pathlib import Path

import torch

from blackpoint.sampling.export.export import moved_into_place
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.pixel_model import build_pixel_model
from blackpoint.train.target_process import fine_tuned_process

BASE = "base"


def starting_model(config: TrainConfig) -> DiffusionModel:
    """Loads or builds the model, with the process that it is to be trained to; writes nothing.

    The encoders of a checkpoint are held in trainer.encoder_dtype, which is settled.
    """
    if config.checkpoint is not None:
        model = DiffusionModel.load(config.checkpoint)
        hold_encoders(model, config)
        model.process = fine_tuned_process(config, model.process)
        return model
    process = fine_tuned_process(config, Process(NoiseSchedule.scaled_linear()))
    model = build_pixel_model(config.model, config.data.resolution, process)
    model.source = str(Path(config.run_dir) / BASE)
    return model


def hold_encoders(model: DiffusionModel, config: TrainConfig) -> None:
    """Holds the encoders in trainer.encoder_dtype; a model made for the run is kept before that."""
    model.set_encoder_dtype(getattr(torch, config.trainer.encoder_dtype))


def keep_base(model: DiffusionModel, config: TrainConfig) -> None:
    """Writes a model made for the run to run_dir/base, once: its checkpoints are weights alone."""
    base = Path(config.run_dir) / BASE
    if config.checkpoint is None and not base.exists():
        with moved_into_place(base) as folder:
            model.save(folder)
