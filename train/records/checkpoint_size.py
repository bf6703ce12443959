"""What a checkpoint was made for, the size of images and of texts, read from its configs alone."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL

from blackpoint.data.files.errors import UserError
from blackpoint.data.order.buckets import BucketsConfig, Size
from blackpoint.sampling.checkpoints.architecture import sample_size_of
from blackpoint.sampling.checkpoints.loading import Part
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.choices import PLAIN, SingleFileConfig
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.text_encoding import chunks_of


def checkpoint_size(checkpoint: str, field: str, single_file: SingleFileConfig = PLAIN) -> int:
    """Returns the side that a checkpoint was made for, in pixels: sample_size times its factor.

    Raises UserError, naming the `field` to set, where it does not say one side.
    """
    pipeline = resolve(checkpoint, single_file=single_file).pipeline
    if pipeline.path.is_dir() and not (pipeline.path / "unet" / "config.json").is_file():
        DiffusionModel.load(checkpoint, with_unet=False)  # which says what it is instead
    side = sample_size_of(pipeline.read_json("unet/config.json"))
    pixels = PixelForm.of(pipeline.read_json("model_index.json"), checkpoint)
    if not isinstance(side, int) or side < 1:
        raise UserError(
            f"{field}=0: checkpoint={checkpoint} does not say what size it was made for "
            f"(sample_size={side} in unet/config.json); set {field}, in pixels"
        )
    if pixels is not None:
        return side * pixels.codec.patch
    vae = Part(AutoencoderKL, pipeline, "vae", torch.float32)
    return side * 2 ** (len(vae.setting("block_out_channels")) - 1)


def check_side(model: DiffusionModel, field: str, side: int) -> tuple[int, ...]:
    """Returns the shape of x0 of images with that side; raises UserError that names the field."""
    try:
        return model.latent_shape(side, side)
    except UserError as error:
        raise UserError(f"{field}={side}: {error}") from None


def check_buckets(model: DiffusionModel, buckets: BucketsConfig, sizes: Iterable[Size]) -> None:
    """Raises UserError for a (width, height) of theirs that the UNet cannot take."""
    for width, height in sizes:
        try:
            model.latent_shape(height, width)
        except UserError as error:
            raise UserError(
                f"{buckets.SECTION}buckets.step_px={buckets.step_px} makes images of {width} x "
                f"{height} px, but {error}; set step_px to that"
            ) from None


def check_max_tokens(model: DiffusionModel, field: str, max_tokens: int | None) -> None:
    """Raises UserError, which names the field, for a length that the model's texts can't have."""
    if max_tokens is not None and model.tokenizer is None:
        raise UserError(f"{field}={max_tokens}: this model has no text encoder; set {field}=null")
    if max_tokens is not None:
        chunks_of(max_tokens, model.tokenizer, field)
