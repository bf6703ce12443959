"""What of a model a single file carries: weights. All else is as the layout's readers assume it.

A reader rebuilds the networks from the shapes of the weights, by the rules of latent-diffusion: 8
heads with CLIP's text encoder (SD 1.x), heads of 64 channels with OpenCLIP's (SD 2.x) or both
(SDXL), CLIP's vocabulary, and one way of everything that no shape tells. A model that is otherwise
would be read as another one, without a word.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.ldm_architecture import (
    HEAD_WIDTH,
    HEADS,
    SCALING_FACTOR,
    XL_SCALING_FACTOR,
)
from blackpoint.sampling.checkpoints.ldm_keys import is_open_clip
from blackpoint.sampling.checkpoints.loading import load_tokenizer
from blackpoint.sampling.checkpoints.single_file import CLIP_TOKENS, OPEN_CLIP_PAD, TOKENIZER
from blackpoint.sampling.export.clients import not_carried, of_xl
from blackpoint.sampling.model import DiffusionModel

CLIP_POSITIONS = 77
OPEN_CLIP_PAD_ID = 0
WORDS = "An astronaut riding a horse: 42 photorealistic, award-winning photographs (don't blur)"
UNET_TOLD = {
    *("block_out_channels", "down_block_types", "up_block_types", "layers_per_block"),
    *("cross_attention_dim", "attention_head_dim", "use_linear_projection"),
}
VAE_TOLD = {"block_out_channels", "down_block_types", "up_block_types", "layers_per_block"}
"""Settings that shapes tell, or rules of their own below."""
NO_EFFECT = {"sample_size", "upcast_attention", "force_upcast", "dropout"}
"""Settings that change sizes offered and number formats alone."""
UNET_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
VAE_BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
PUBLISHED_VAE = {"latent_channels": 4, "norm_num_groups": 32, "scaling_factor": SCALING_FACTOR}
XL_TOLD = {"transformer_layers_per_block", "projection_class_embeddings_input_dim"}
PUBLISHED_XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
REMEDY = "give output a name without .safetensors: a diffusers folder carries it"


def check_carried(model: DiffusionModel, checkpoint: object) -> None:
    """Raises UserError where a single file would be read as another model; names the reason."""
    reason = (
        "it works in pixels, and the layout of single files has an autoencoder's latents"
        if model.pixels is not None
        else not_carried(model.process)
        or other_network(model)
        or other_words(model)
        or other_second_text(model)
    )
    if reason:
        raise UserError(
            f"checkpoint={checkpoint} can't be written as a single file: {reason}; {REMEDY}"
        )


def other_network(model: DiffusionModel) -> str | None:
    """Names a setting that a reader of the file would assume otherwise."""
    unet, vae, text = model.unet.config, model.vae.config, model.text_encoder.config.to_dict()
    is_xl = of_xl(unet)
    open_clip = is_open_clip(text) or is_xl
    scale = {"scaling_factor": XL_SCALING_FACTOR} if is_xl else {}
    told = UNET_TOLD | NO_EFFECT | (XL_TOLD if is_xl else set())
    return (
        _unlike("unet", unet, UNet2DConditionModel, told, PUBLISHED_XL if is_xl else {})
        or _other_blocks("unet", unet, UNET_BLOCKS)
        or _other_heads(unet, open_clip)
        or _unlike("vae", vae, AutoencoderKL, VAE_TOLD | NO_EFFECT, PUBLISHED_VAE | scale)
        or _other_blocks("vae", vae, VAE_BLOCKS)
        or _other_text(text)
    )


def other_second_text(model: DiffusionModel) -> str | None:
    """Names a setting of SDXL's text encoders or second tokenizer that readers assume otherwise."""
    if not of_xl(model.unet.config):
        return None
    encoders = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
    for part, activation in encoders.items():
        if (given := getattr(model, part).config.hidden_act) != activation:
            return f"hidden_act={given} in {part}/config.json, and readers assume {activation}"
    first, second = model.tokenizers
    if second.get_vocab() != first.get_vocab():
        return "its second tokenizer has other words than its first, and readers have CLIP's twice"
    if second.pad_token_id != OPEN_CLIP_PAD_ID:
        return (
            f"its second tokenizer fills texts up with token {second.pad_token_id}, and readers "
            f"assume {OPEN_CLIP_PAD_ID}"
        )
    return _other_text(model.text_encoder_2.config.to_dict(), "text_encoder_2")


def other_words(model: DiffusionModel) -> str | None:
    """Names what its tokenizer does otherwise than CLIP's, which is the one that readers have."""
    config = model.text_encoder.config.to_dict()
    pad = {"pad_token": OPEN_CLIP_PAD} if is_open_clip(config) else {}
    ours, clips = model.tokenizer, load_tokenizer(TOKENIZER, config, **pad)
    differs = "and no tokenizer is in a single file"
    if ours.get_vocab() != clips.get_vocab():
        return f"its tokenizer has another vocabulary than CLIP's (of {len(ours)} words), {differs}"
    if ours(WORDS).input_ids != clips(WORDS).input_ids:
        return f"its tokenizer cuts words otherwise than CLIP's, {differs}"
    if ours.pad_token_id != clips.pad_token_id:
        return (
            f"its tokenizer fills texts up with {ours.pad_token}, readers with {clips.pad_token}, "
            f"{differs}"
        )
    return None


def _unlike(
    part: str, config: Mapping[str, Any], kind: Any, told: set[str], published: dict[str, Any]
) -> str | None:
    parameters = inspect.signature(kind.__init__).parameters
    expected = {key: parameter.default for key, parameter in parameters.items()} | published
    for key, value in config.items():
        if key in expected and key not in told and _plain(value) != _plain(expected[key]):
            return (
                f"{key}={value} in {part}/config.json, which no weight shows, and readers assume "
                f"{expected[key]}"
            )
    return None


def _other_blocks(part: str, config: Mapping[str, Any], known: set[str]) -> str | None:
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    if unknown := sorted(blocks - known):
        return f"{part}/config.json has blocks of type {unknown[0]}, which have no names there"
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    if any(width % widths[0] for width in widths):
        return f"block_out_channels={widths} in {part}/config.json are no multiples of the first"
    if not isinstance(layers, int):
        return f"layers_per_block={layers} in {part}/config.json is not one number for all levels"
    return None


def _other_heads(config: Mapping[str, Any], open_clip: bool) -> str | None:
    """diffusers calls the number of heads attention_head_dim, one for all levels or one for each.

    The number of heads of a middle block is that of the last level.
    """
    widths, heads = config["block_out_channels"], config["attention_head_dim"]
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(widths)
    expected = [max(width // HEAD_WIDTH, 1) if open_clip else HEADS for width in widths]
    if heads != expected:
        return (
            f"its UNet has {heads} attention heads by level (attention_head_dim), which no weight "
            f"shows, and readers assume {expected}"
        )
    if bool(config["use_linear_projection"]) != open_clip:
        return (
            f"use_linear_projection={config['use_linear_projection']} in unet/config.json does not "
            f"go with its text encoder: {'OpenCLIP' if open_clip else 'CLIP'}'s is read with "
            f"{open_clip}"
        )
    return None


def _other_text(config: Mapping[str, Any], part: str = "text_encoder") -> str | None:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    expected = {
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "max_position_embeddings": CLIP_POSITIONS,
        "vocab_size": CLIP_TOKENS,
        "layer_norm_eps": CLIPTextConfig().layer_norm_eps,
    }
    given = {**config, "num_attention_heads": heads}
    for key, value in expected.items():
        if given[key] != value:
            return f"{key}={given[key]} in {part}/config.json, and readers assume {value}"
    if config["hidden_act"] not in ("gelu", "quick_gelu"):
        return f"hidden_act={config['hidden_act']} in {part}/config.json is no CLIP's"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
