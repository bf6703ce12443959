"""What a config leaves to the data and the checkpoint: the size of images, the steps of epochs."""

import math
from dataclasses import asdict, replace
from pathlib import Path

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.data.module import CaptionedImages
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.checkpoint_size import checkpoint_size
from blackpoint.train.records.first_process import is_first_process, note
from blackpoint.train.records.run_directory import RunRecord, describe_batch


def sized(config: TrainConfig, record: RunRecord) -> TrainConfig:
    """Returns the config with data.resolution: its own, or the run's, or its latents', or the
    checkpoint's; the user is told of those that a new run takes.

    Raises UserError where there is none of them.
    """
    if config.data.resolution:
        return config
    side = record.written.get("data.resolution")
    if not side:
        side, source = _size_of_new_run(config)
        note(f"data.resolution={side}, the size {source}")
    return replace(config, data=replace(config.data, resolution=side))


def with_max_steps(config: TrainConfig, run_dir: Path, num_started: int = 1) -> TrainConfig:
    """Returns the config with the trainer.max_steps that trainer.max_epochs comes to, if it is set.

    Counts the images, which may index their shards, unless the run has been begun with as many
    epochs of as large steps; raises UserError for data that can't be read, or have no index where
    several processes are started at once.
    """
    if config.trainer.max_epochs is None:
        return config
    record, values = RunRecord.read(run_dir), flat(asdict(config))
    keys = ("trainer.max_epochs", "batch_size", "trainer.accumulate_grad_batches")
    if not record.is_new and all(record.written.get(key) == values[key] for key in keys):
        steps = record.values["trainer.max_steps"]
    else:
        images = CaptionedImages(config.data, config.seed, config.batch_size)
        images.require_index(num_started)
        if is_first_process():
            images.prepare_data()
        images.setup("fit")
        count, per_step = images.num_training_images, describe_batch(config)["images_per_step"]
        steps = steps_of_epochs(config, count)
        note(
            f"trainer.max_epochs={config.trainer.max_epochs:g}: trainer.max_steps={steps}, of "
            f"{per_step} of {count} images"
        )
    return replace(config, trainer=replace(config.trainer, max_steps=steps))


def steps_of_epochs(config: TrainConfig, num_images: int) -> int:
    """Returns the optimizer steps of trainer.max_epochs, the last one counted whole."""
    assert config.trainer.max_epochs is not None
    images = config.trainer.max_epochs * num_images
    return max(1, math.ceil(round(images / describe_batch(config)["images_per_step"], 6)))


def _size_of_new_run(config: TrainConfig) -> tuple[int, str]:
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    for where, encoding in images.encodings():
        if encoding is not None:
            return encoding.resolution, f"of the latents of {where}"
    if config.checkpoint is None:
        raise UserError(
            "data.resolution=0: a model that is made for the run has no size of its own; set "
            "data.resolution, in pixels"
        )
    side = checkpoint_size(config.checkpoint, "data.resolution", config.single_file)
    return side, f"that checkpoint={config.checkpoint} was made for"
