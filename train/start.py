"""The model that a run starts from: a checkpoint, or a pixel-space model made for the run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.export.placement import moved_into_place
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.runtime.speed import check_levels, prepare_unet
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.callbacks.exports import check_exports
from blackpoint.train.cluster.device import COMPUTE_DTYPE
from blackpoint.train.config.config import PreviewConfig, TrainConfig
from blackpoint.train.dropout import dropout_levels
from blackpoint.train.lora import check_layers
from blackpoint.train.loss import check_scales
from blackpoint.train.pixel_model import build_pixel_model
from blackpoint.train.records.checkpoint_size import (
    check_buckets,
    check_max_tokens,
    check_side,
)
from blackpoint.train.records.first_process import note
from blackpoint.train.records.run_directory import CHECKPOINT, CONFIG
from blackpoint.train.target_process import fine_tuned_process

BASE = "base"
NUM_SHOWN = 12


def starting_model(config: TrainConfig, device: torch.device) -> DiffusionModel:
    """Returns the model, ready to train on `device` to the process of the config; writes nothing.

    Its encoders are held in trainer.encoder_dtype, which is settled, and read when they are needed;
    those of a model made for the run only after `keep_base`. Raises UserError for a model that
    cannot be trained as the config says.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        if CHECKPOINT.fullmatch(path.name) and (path.parent.parent / CONFIG).is_file():
            note(
                f"checkpoint={path}: every start of this run reads it, and its own run removes it "
                "when that goes on; start from a copy, or from an export of it"
            )
        model = DiffusionModel.load(
            config.checkpoint,
            single_file=config.single_file,
            undecided=config.loss.prediction_type,
        )
        hold_encoders(model, config)
        model.base_process = None if model.process.incompatibility() else model.process
        model.process = fine_tuned_process(config, model.process)
    else:
        process = fine_tuned_process(config, Process(NoiseSchedule.scaled_linear()))
        resolution = config.data.resolution
        model = build_pixel_model(config.model, resolution, process, config.single_file)
        model.source = str(Path(config.run_dir) / BASE)
    check_exports(config, model)
    if reason := model.process.not_exported():
        note(f"{reason}; sample the checkpoints of {config.run_dir} with allow_unsound=true")
    check_side(model, "data.resolution", config.data.resolution)
    check_max_tokens(model, "data.max_tokens", config.data.max_tokens)
    side = config.data.resolution // model.downsampling_factor
    dropout_levels(model.unet, config.dropout, side)  # raises
    check_layers(model.unet, config.lora)
    check_levels(model.unet, config.trainer.gradient_checkpointing_levels)
    trainer = config.trainer
    note(
        prepare_unet(
            model.unet,
            trainer.attention,
            trainer.channels_last,
            trainer.compile,
            device=device,
            dtype=COMPUTE_DTYPE[trainer.precision],
            training=True,
            compile_mode=trainer.compile_mode,
        )
    )
    return model


def check_sizes(
    model: DiffusionModel, images: CaptionedImages, pool_factors: Sequence[int]
) -> None:
    """Raises UserError for a size that the UNet cannot halve evenly or the loss cannot pool."""
    check_buckets(model, images.config.buckets, images.sizes())
    for width, height in images.sizes():
        _, *sides = model.latent_shape(height, width)
        check_scales(pool_factors, *sides)


def programs_note(images: CaptionedImages) -> str:
    """Says for which sizes torch.compile makes programs."""
    sizes = [f"{width} x {height}" for width, height in images.sizes()]
    shown = ", ".join(sizes[:NUM_SHOWN]) + (", ..." if len(sizes) > NUM_SHOWN else "")
    return (
        "trainer.compile=true: a program for each size of a batch, at its first step: "
        f"{len(sizes)} ({shown} px); validation and previews add theirs"
    )


def hold_encoders(model: DiffusionModel, config: TrainConfig) -> None:
    """Holds the encoders in trainer.encoder_dtype; a model made for the run is kept before that."""
    model.set_encoder_dtype(getattr(torch, config.trainer.encoder_dtype))


def load_encoders(model: DiffusionModel, images: CaptionedImages, preview: PreviewConfig) -> bool:
    """Loads the encoders if images or previews need them, and says where few or none are.

    Returns whether images do, so that every training step needs them.
    """
    previews = bool(preview.every_steps and preview.prompts)
    if previews and model.tokenizer is None:
        model.encode_prompts(preview.prompts)  # refuses what it does not know
    if all(encoding is not None for _, encoding in images.encodings()):
        if not previews:
            note("cached latents: the VAE and the text encoder are not loaded")
            return False
        note(
            "cached latents: the VAE and the text encoder are loaded for previews alone, and wait "
            "in the CPU's memory in between; preview.every_steps=0 saves that too"
        )
        model.load_encoders()
        return False
    model.load_encoders()
    return True


def keep_base(model: DiffusionModel, config: TrainConfig) -> None:
    """Writes a model made for the run to run_dir/base, once: its checkpoints are weights alone."""
    base = Path(config.run_dir) / BASE
    if config.checkpoint is None and not base.exists():
        with moved_into_place(base) as folder:
            model.save(folder)
