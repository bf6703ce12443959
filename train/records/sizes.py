"""The size of images where none was asked for: that of the run, the cache or the checkpoint."""

from dataclasses import replace

from blackpoint.data.files.errors import UserError
from blackpoint.data.module import CaptionedImages
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.checkpoint_size import checkpoint_size
from blackpoint.train.records.first_process import note
from blackpoint.train.records.run_directory import RunRecord


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
