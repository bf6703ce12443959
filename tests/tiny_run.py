"""A tiny data set of shards, and a train config over it and a tiny random pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from data.pack import PackConfig, pack
from train.config import TrainConfig


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


def tiny_config(run_dir: Path, pipeline: Path, shards: Path, **overrides: Any) -> TrainConfig:
    """Returns a config of 6 steps of 4 images on the CPU; `overrides` are dotted keys."""
    config = OmegaConf.structured(TrainConfig)
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": str(pipeline),
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
