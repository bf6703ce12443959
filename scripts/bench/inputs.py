"""What the contestants of the benchmark read: one data set in the form that each of them takes.

Ours read shards, of images and of encoded images. The others read the same files unpacked into a
folder, as people have them: `key.png` beside `key.txt`, and `key.safetensors` with the cached
moments and prompt embeddings. The bare loop holds its batches in memory.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.images.decode import IMAGE_SUFFIXES, decode
from blackpoint.data.shards.listing import find_shards
from blackpoint.data.transform import transform
from blackpoint.scripts import cli
from blackpoint.scripts.config import load
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import with_learning_rate


@dataclass(frozen=True)
class Inputs:
    """Folders of one data set."""

    encoded_shards: Path
    images: Path
    encoded: Path


def prepare(config: TrainConfig, folder: Path) -> Inputs:
    """Encodes the training shards of `config` by `data encode` and unpacks both forms."""
    inputs = Inputs(folder / "encoded_shards", folder / "images", folder / "encoded")
    settings = {
        "source": config.data.shards,
        "checkpoint": config.checkpoint,
        "output": inputs.encoded_shards,
        "resolution": config.data.resolution,
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    if cli.main(["data", "encode", *arguments]):
        raise RunFailed("the data set could not be encoded; what is above says why")
    assert config.data.shards is not None
    _unpack(config.data.shards, inputs.images)
    _unpack(str(inputs.encoded_shards), inputs.encoded)
    return inputs


def training_config(yaml: str, run_dir: Path, max_steps: int, **changes: object) -> TrainConfig:
    """Loads the fine-tune that is timed: without previews, validation and checkpoints between."""
    settings = {
        "run_dir": run_dir,
        "trainer.max_steps": max_steps,
        "trainer.accumulate_grad_batches": 1,
        "trainer.checkpoint_every_steps": max_steps,
        "trainer.validate_every_steps": 0,
        "data.validation_shards": "null",
        "data.num_workers": 0,
        "preview.every_steps": 0,
        "wandb.enabled": "false",
        **changes,
    }
    config = load(TrainConfig, [yaml, *(f"{key}={value}" for key, value in settings.items())])
    return with_learning_rate(config)


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """Lists (image, caption) of an unpacked folder, by name."""
    return [
        (path, path.with_suffix(".txt").read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*"))
        if path.suffix[1:] in IMAGE_SUFFIXES
    ]


def cached_files(folder: Path) -> list[Path]:
    """Lists the cached samples of an unpacked folder, by name."""
    return sorted(folder.rglob("*.safetensors"))


def held_images(folder: Path, resolution: int, batch_size: int, count: int) -> list[dict[str, Any]]:
    """Returns batches decoded in memory: image uint8 (B, 3, H, W), center crop, and caption."""
    batches = []
    for rows in _batches(captioned_images(folder), batch_size, count):
        pixels = [
            transform(decode(path.read_bytes()), (resolution, resolution), 0.5, 0.5, flip=False)
            for path, _ in rows
        ]
        images = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
        batches.append({"image": images, "caption": [caption for _, caption in rows]})
    return batches


def held_moments(folder: Path, batch_size: int, count: int) -> list[dict[str, Any]]:
    """Returns batches in memory: moments (B, 2C, h, w) and prompt_embeds (B, L, D), float32."""
    batches = []
    for paths in _batches(cached_files(folder), batch_size, count):
        samples = [load_file(path) for path in paths]
        batches.append(
            {
                name: torch.stack([sample[name].float() for sample in samples])
                for name in ("moments", "prompt_embeds")
            }
        )
    return batches


def _unpack(shards: str, folder: Path) -> None:
    for shard in find_shards(shards, "data.shards"):
        with tarfile.open(shard) as tar:
            tar.extractall(folder, filter="data")


def _batches(items: list[Any], batch_size: int, count: int) -> list[list[Any]]:
    """Cuts `count` batches, going round where there are too few items."""
    return [
        [items[(start + row) % len(items)] for row in range(batch_size)]
        for start in range(0, count * batch_size, batch_size)
    ]
