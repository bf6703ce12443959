"""The size of images where none was asked for: that of the run, the cache or the checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from blackpoint.data.files.dotted import value_at
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.data.latents import Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.loss import check_scales
from blackpoint.train.records.checkpoint_size import checkpoint_size


def sized(config: TrainConfig, run_dir: Path, say: Callable[[str], None]) -> TrainConfig:
    """Returns the config with data.resolution: its own, or the run's, or its latents', or the
    checkpoint's; `say` is told of those that a new run takes.

    Raises UserError where there is none of them.
    """
    if config.data.resolution:
        return config
    saved = run_dir / "config.yaml"
    if saved.exists():
        side = value_at(read_yaml_file(saved), "data.resolution")
        if side:
            return _with(config, side)
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    latents = _latents(images.encodings())
    if latents is not None:
        where, side = latents
        say(f"data.resolution={side}, the size of the latents of {where}")
        return _with(config, side)
    if config.checkpoint is None:
        raise UserError(
            "data.resolution=0: a model that is made for the run has no size of its own; set "
            "data.resolution, in pixels"
        )
    side = checkpoint_size(config.checkpoint, "data.resolution")
    say(f"data.resolution={side}, the size that checkpoint={config.checkpoint} was made for")
    return _with(config, side)


def check_sizes(
    model: DiffusionModel, images: CaptionedImages, pool_factors: Sequence[int]
) -> None:
    """Raises UserError for a size that the UNet cannot halve evenly or the loss cannot pool."""
    for width, height in images.sizes():
        try:
            _, *sides = model.latent_shape(height, width)
        except UserError as error:
            raise UserError(
                f"data.buckets.step_px={images.config.buckets.step_px} makes images of {width} x "
                f"{height} px, but {error}; set step_px to that"
            ) from None
        check_scales(pool_factors, *sides)


def _with(config: TrainConfig, side: int) -> TrainConfig:
    return replace(config, data=replace(config.data, resolution=side))


def _latents(data_sets: Sequence[tuple[str, Encoding | None]]) -> tuple[str, int] | None:
    """Returns the first data set of latents, and its size."""
    return next(((where, found.resolution) for where, found in data_sets if found), None)
