"""Tiny pixel-space models and their configs, for tests of everything that takes one."""

from pathlib import Path
from typing import Any

from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.model_config import ModelConfig
from blackpoint.train.pixel_model import build_pixel_model

CLASSES = ["a black background", "a white background", "a gray background"]
UNET = {
    "channels": [16, 32],
    "blocks": [1, 2],
    "transformer_blocks": [0, 1],
    "head_channels": 16,
    "patch": 2,
}
UVIT = UNET | {"blocks": [1, 1], "transformer_blocks": [0, 3]}


def model_config(condition: str, pipeline: Path | None = None, /, **changes: Any) -> ModelConfig:
    """Returns the config of a model of 16 px images."""
    own = {"class": {"classes": CLASSES}, "text": {"text_encoder": str(pipeline)}}
    return ModelConfig(**(UNET | {"condition": condition} | own.get(condition, {}) | changes))


def pixel_model(condition: str, pipeline: Path | None = None, /, **changes: Any) -> DiffusionModel:
    """Builds the model with a process of its own."""
    schedule = NoiseSchedule.cosine_continuous(-15, 15).zero_terminal_snr().shifted(8, 16)
    return build_pixel_model(model_config(condition, pipeline, **changes), 16, Process(schedule))


def pixel_train_config(
    run_dir: Path, shards: Path, condition: str, pipeline: Path | None = None, **overrides: Any
) -> TrainConfig:
    """Returns a config of 6 steps from random weights."""
    from tests.tiny_run import tiny_config

    model = {
        f"model.{key}": value
        for key, value in vars(model_config(condition, pipeline)).items()
        if value is not None
    }
    schedule = {
        "schedule.betas": "cosine_continuous",
        "schedule.log_snr_min": -15,
        "schedule.log_snr_max": 15,
    }
    return tiny_config(run_dir, None, shards, **(model | schedule | overrides))
