"""What a .safetensors file holds, by its names alone: the parts of a Stable Diffusion, or not.

Foreign files hold more than the weights in use: buffers of latent-diffusion's schedule, an average
of the UNet, the last layer of OpenCLIP, losses of the autoencoder. That is passed over; what is
none of it and no part's is refused, for then the file is of another model.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.safetensors_file import Header
from blackpoint.sampling.checkpoints.architecture import BY_CHANNELS, REFINER, REMEDY
from blackpoint.sampling.checkpoints.ldm_keys import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    XL_CLIP_PREFIX,
    XL_OPEN_CLIP_PREFIX,
    ema_name,
    published_text_name,
)
from blackpoint.sampling.choices import Weights

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
REFINER_WIDTH = 384
"""Of the first block of SDXL's refiner."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
LORA = re.compile(r"(^lora_|\.lora_|\.lora\.|\.hada_w|\.lokr_w|\.oft_|\.dora_scale)")
SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)$")
PASSED_OVER = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recipm?1?_alphas_cumprod|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|lvlb_weights|scale_factor|"
    r"v_pred|ztsnr|model_ema\..*|first_stage_model\.(loss|model_ema)\..*|"
    r"cond_stage_model\.(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?|attn_mask)|"
    r"cond_stage_model\.model\.visual\..*|"
    r"conditioner\.embedders\.\d\.(.*\.)?(position_ids|logit_scale|attn_mask)|"
    r"conditioner\.embedders\.0\.transformer\.text_projection\.weight|"
    r"conditioner\.embedders\.1\.model\.visual\..*|denoiser\.sigmas)"
)
"""Keys that may be there and are not read."""
OTHER_PROCESSES = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
OTHER_MODELS = {
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "a Flux, or another transformer",
    "joint_blocks.": "the transformer of a Stable Diffusion 3",
    "double_blocks.": "the transformer of a Flux",
    "transformer_blocks.": "a transformer",
    "control_model.": "a ControlNet",
    "text_encoders.": "a Stable Diffusion 3 or a Flux",
}
BARE = {
    "input_blocks.": "a UNet alone",
    "down_blocks.": "a UNet alone, with diffusers' names",
    "decoder.": "an autoencoder alone",
    VAE_PREFIX: "an autoencoder alone",
    "text_model.": "a text encoder alone",
}
WHOLE = "give a file that holds UNet, autoencoder and text encoder, or a diffusers folder"
Keys = dict[str, str]
"""Names of the layout -> keys of the file."""


@dataclass(frozen=True)
class Contents:
    """The keys of each part of a Stable Diffusion; no vae where the file has none."""

    unet: Keys
    vae: Keys
    text_encoder: Keys
    text_encoder_2: Keys
    """None but in SDXL."""
    averaged: bool
    """Whether the UNet's keys are those of its average, model_ema."""

    @property
    def is_sd2(self) -> bool:
        """Whether it is a Stable Diffusion 2.x: its text encoder is OpenCLIP's."""
        return next(iter(self.text_encoder)).startswith(OPEN_CLIP_PREFIX)

    @property
    def is_xl(self) -> bool:
        """Whether it is a Stable Diffusion XL: it has two text encoders."""
        return bool(self.text_encoder_2)


def contents_of(header: Header, what: str, weights: Weights) -> Contents:
    """Sorts the keys of a file; raises UserError, of `what` file, for those of another model.

    `weights` chooses the UNet's average where the file holds both.
    """
    shapes = header.shapes
    _refuse_others(header, what)
    unet = {key: key for key in shapes if key.startswith(UNET_PREFIX)}
    averages = {key: ema_name(key) for key in unet}
    averaged = weights == "ema" and all(name in shapes for name in averages.values())
    vae = {key: key for key in shapes if _is_of(VAE_PREFIX, key)}
    second = {key: key for key in shapes if _is_of(XL_OPEN_CLIP_PREFIX, key)}
    clip = XL_CLIP_PREFIX if second else CLIP_PREFIX
    text = {
        clip + published_text_name(key.removeprefix(clip)): key
        for key in shapes
        if _is_of(clip, key)
    } or {key: key for key in shapes if _is_of(OPEN_CLIP_PREFIX, key)}
    used = {*unet, *vae, *text.values(), *second}
    if not text:
        raise UserError(
            f"{what} holds no text encoder (no key starts with {CLIP_PREFIX} or "
            f"{OPEN_CLIP_PREFIX}); {WHOLE}"
        )
    if unknown := [key for key in shapes if key not in used and not PASSED_OVER.fullmatch(key)]:
        raise UserError(
            f"{what} holds {len(unknown)} tensors that are no Stable Diffusion's, such as "
            f"{unknown[0]}; {REMEDY}"
        )
    contents = Contents(averages if averaged else unet, vae, text, second, averaged)
    for keys in (contents.unet, contents.vae, contents.text_encoder, contents.text_encoder_2):
        _refuse_formats(header, keys.values(), what)
    return contents


def vae_keys(header: Header, what: str) -> Keys:
    """Returns the keys of an autoencoder in a file of its own or in a whole one; UserError if there
    is none."""
    shapes = header.shapes
    keys = {key: key for key in shapes if _is_of(VAE_PREFIX, key)}
    if not keys:
        own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        keys = {VAE_PREFIX + key: key for key in shapes if key.startswith(own)}
    if f"{VAE_PREFIX}decoder.conv_in.weight" not in keys:
        raise UserError(
            f"{what} holds no autoencoder with the names of single files "
            "(first_stage_model.decoder.conv_in.weight, with or without first_stage_model.); name "
            "such a file, or a diffusers folder with vae/ or config.json"
        )
    _refuse_formats(header, keys.values(), what)
    return keys


def open_clip_is_whole(header: Header) -> bool:
    """Whether the text encoder is OpenCLIP's as it was trained, with its last layer."""
    ends = (f"{OPEN_CLIP_PREFIX}logit_scale", f"{OPEN_CLIP_PREFIX}text_projection")
    return any(key in header.shapes for key in ends)


def shapes_of(header: Header, keys: Keys, prefix: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a part by its names in the layout, without prefix."""
    return {name.removeprefix(prefix): header.shapes[key] for name, key in keys.items()}


def _is_of(prefix: str, key: str) -> bool:
    return key.startswith(prefix) and not PASSED_OVER.fullmatch(key)


def _refuse_others(header: Header, what: str) -> None:
    shapes = header.shapes
    if not shapes:
        raise UserError(f"{what} holds no tensors; {WHOLE}")
    if any(LORA.search(key) for key in shapes):
        raise UserError(
            f"{what} is a LoRA, or another adapter: a change of a model and not a model; name the "
            "checkpoint that it changes"
        )
    weights = [key for key in shapes if key.endswith((".weight", ".bias"))]
    _refuse_formats(header, weights, what)
    first = f"{UNET_PREFIX}input_blocks.0.0.weight"
    conv_in = shapes.get(first, ())
    _refuse_parts_of_xl(header, what, conv_in)
    for start, name in OTHER_MODELS.items():
        if _starts(shapes, start):
            raise UserError(f"{what} is {name}; {REMEDY}")
    if first not in shapes:
        for start, name in BARE.items():
            if _starts(shapes, start):
                raise UserError(f"{what} holds {name}; {WHOLE}")
        raise UserError(
            f"{what} holds no Stable Diffusion ({first} is missing; its first key is "
            f"{next(iter(shapes))}); {WHOLE}"
        )
    if len(conv_in) == 4 and conv_in[1] != 4:
        kind = BY_CHANNELS.get(conv_in[1], "another model than a text-to-image model")
        raise UserError(f"{what} is {kind} (its UNet has {conv_in[1]} input channels); {REMEDY}")
    for key in OTHER_PROCESSES:
        if key in shapes:
            raise UserError(
                f"{what} was trained on another process than noise by betas on whole timesteps (it "
                f"holds {key}); {REMEDY}"
            )


def _refuse_formats(header: Header, keys: Iterable[str], what: str) -> None:
    if scaled := [key for key in header.shapes if SCALED.search(key)]:
        raise UserError(
            f"{what} holds scaled fp8 weights ({scaled[0]}); take the same model in fp16, bf16 or "
            "fp32"
        )
    for key in keys:
        if header.formats[key] not in FLOATS:
            raise UserError(
                f"{what} holds {key} in {header.formats[key]}, which is quantised or no weight; "
                "take the same model in fp16, bf16 or fp32"
            )


def _refuse_parts_of_xl(header: Header, what: str, conv_in: tuple[int, ...]) -> None:
    """Raises UserError for the refiner, and for a UNet or text encoders of SDXL alone."""
    if conv_in[:1] == (REFINER_WIDTH,):
        raise UserError(f"{what} is {REFINER}; {REMEDY}")
    encoders = [_starts(header.shapes, p) for p in (XL_CLIP_PREFIX, XL_OPEN_CLIP_PREFIX)]
    has_sizes = f"{UNET_PREFIX}label_emb.0.0.weight" in header.shapes
    if has_sizes and not any(encoders):
        raise UserError(
            f"{what} is a Stable Diffusion XL without its text encoders, or another model with "
            f"more than a text as its condition; {WHOLE}, or {REMEDY}"
        )
    if any(encoders) and not (has_sizes and all(encoders)):
        missing = f"{UNET_PREFIX}label_emb."
        if has_sizes:
            missing = XL_OPEN_CLIP_PREFIX if encoders[0] else XL_CLIP_PREFIX
        raise UserError(
            f"{what} is a part of a Stable Diffusion XL (no key starts with {missing}); {WHOLE}"
        )


def _starts(keys: Iterable[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)
