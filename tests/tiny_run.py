"""A tiny data set of shards, a train config over it and a tiny random pipeline, and broken runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.testing import assert_close

from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.target_process import fine_tuned_process


def make_tiny_shards(folder: Path, num_images: int = 12) -> Path:
    """Packs flat-colored 16 px images, captioned by their luminance, and returns the shards."""
    source = folder / "source"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(num_images):
        color = ("black", "white", "gray")[number % 3]
        level = {"black": 0, "white": 255, "gray": 128}[color]
        pixels = np.clip(level + rng.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{number:03d}.png")
        text = f"a {color} background" if number % 2 else f"a photo of the {color} night"
        (source / f"{number:03d}.txt").write_text(text)
    pack(PackConfig(source=str(source), output=str(folder / "shards")))
    return folder / "shards"


def tiny_tuner(pipeline: Path, **overrides: Any) -> FineTuner:
    """Returns the module of a tiny run, with the process that it trains to; reads no shards."""
    config = tiny_config(Path("run"), pipeline, Path("shards"), **overrides)
    model = DiffusionModel.load(pipeline)
    model.process = fine_tuned_process(config, model.process)
    return FineTuner(model, config)


def tiny_config(
    run_dir: Path, pipeline: Path | None, shards: Path, **overrides: Any
) -> TrainConfig:
    """Returns a config of 6 steps of 4 images on the CPU; `overrides` are dotted keys."""
    config = OmegaConf.structured(TrainConfig)
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": None if pipeline is None else str(pipeline),
        "batch_size": 4,
        "data.shards": str(shards),
        "data.resolution": 16,
        "data.num_workers": 0,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 2,
        "ema.decay": 0.9,
        "trainer.max_steps": 6,
        "trainer.log_every_steps": 1,
        "trainer.validate_every_steps": 3,
        "trainer.checkpoint_every_steps": 3,
        "preview.every_steps": 0,
        "wandb.enabled": False,
    }
    for key, value in (values | overrides).items():
        OmegaConf.update(config, key, value)
    loaded = OmegaConf.to_object(config)
    assert isinstance(loaded, TrainConfig)
    return loaded


def load_checkpoint(run_dir: Path, step: int) -> dict[str, Any]:
    """Reads one checkpoint of a run."""
    path = run_dir / "checkpoints" / f"step_{step:08d}.ckpt"
    return torch.load(path, weights_only=True)


def assert_same_run(run_dir: Path, other: Path, step: int = 6) -> None:
    """Asserts that weights, average, optimizer and metrics of two runs are equal to the bit."""
    one, two = load_checkpoint(run_dir, step), load_checkpoint(other, step)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert_close(one[key], two[key], rtol=0, atol=0)
    measured = ("train/images_per_s", "train/data_wait_share", "memory/")  # of the machine
    metrics = [read_metrics(folder / "metrics.csv") for folder in (run_dir, other)]
    assert {k: v for k, v in metrics[0].items() if not k.startswith(measured)} == {
        k: v for k, v in metrics[1].items() if not k.startswith(measured)
    }


def stop_in_step(
    monkeypatch: pytest.MonkeyPatch, step: int, action: Any, cls: type = FineTuner
) -> None:
    """Makes the training step that follows `step` optimizer steps do `action` first."""
    original = cls.training_step

    def training_step(self: Any, batch: Any, batch_index: int) -> Any:
        if self.global_step == step:
            action()
        return original(self, batch, batch_index)

    monkeypatch.setattr(cls, "training_step", training_step)


class Killed(Exception):
    """Stands in for SIGKILL."""


def kill() -> None:
    """Ends a run without a chance to save."""
    raise Killed
