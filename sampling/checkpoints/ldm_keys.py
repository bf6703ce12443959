"""The names of Stable Diffusion's weights: in diffusers folders, and in single files.

Single files keep the layout of latent-diffusion (LDM), SD 2.x with the text encoder of OpenCLIP,
SDXL with CLIP's and OpenCLIP's. The names follow from the block structure in the config, so that
small models of the same classes have theirs too. Tensors are the same but for the attention of the
autoencoder, which LDM writes as 1x1 convolutions, and for OpenCLIP's: q, k and v are one matrix,
and the text projection is transposed. Reading takes views, writing copies only what it
concatenates.

Names of the text encoder are the published ones, with `text_model.` in front, which transformers 5
drops from the modules.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from blackpoint.data.files.dotted import renamed
from blackpoint.data.files.errors import UserError

Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]
Config = Mapping[str, Any]
State = Mapping[str, Tensor]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
XL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
XL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
EMA_PREFIX = "model_ema."
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
VAE_CONVOLVED = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
"""Matrices of the autoencoder that LDM writes with two more sides of 1."""
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
ONE_OF_QKV = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")
QKV = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")


def to_ldm(part: Part, config: Config, state: State, of_xl: bool = False) -> dict[str, Tensor]:
    """Returns the weights of a part under the names of a single file, prefix included.

    `config` is the config.json of the part. The text encoder is written as OpenCLIP's where its
    activation is gelu, as SD 2.x's, and as transformers' where it is quick_gelu, as SD 1.x's;
    `of_xl`: as one of the two of SDXL. Raises UserError for a weight that has no name there.
    """
    if part in ("text_encoder", "text_encoder_2"):
        state = {published_text_name(name): tensor for name, tensor in state.items()}
        state = {n: tensor for n, tensor in state.items() if not n.endswith("position_ids")}
        if not is_open_clip(config):
            prefix = XL_CLIP_PREFIX if of_xl else CLIP_PREFIX
            return {prefix + name: tensor for name, tensor in state.items()}
        prefix = XL_OPEN_CLIP_PREFIX if of_xl else OPEN_CLIP_PREFIX
        return {prefix + n: t for n, t in _to_open_clip(config, state).items()}
    prefix, table = (
        (UNET_PREFIX, unet_modules(config)) if part == "unet" else (VAE_PREFIX, vae_modules(config))
    )
    result = {prefix + new: state[name] for name, new in _renamed(part, table, state).items()}
    for name, tensor in result.items():
        if part == "vae" and VAE_CONVOLVED.fullmatch(name) and tensor.ndim == 2:
            result[name] = tensor[:, :, None, None]
    return result


def from_ldm(part: Part, config: Config, state: State) -> dict[str, Tensor]:
    """Returns the weights of a part under the names of a diffusers folder, as views.

    `state` holds the part's keys of a single file, with their prefix and nothing else. Raises
    UserError for a key that is none of the part's.
    """
    for clip in (CLIP_PREFIX, XL_CLIP_PREFIX):
        if part == "text_encoder" and all(name.startswith(clip) for name in state):
            return {published_text_name(n.removeprefix(clip)): t for n, t in state.items()}
    if part in ("text_encoder", "text_encoder_2"):
        prefix = OPEN_CLIP_PREFIX if part == "text_encoder" else XL_OPEN_CLIP_PREFIX
        return _from_open_clip(config, {n.removeprefix(prefix): t for n, t in state.items()})
    prefix, table = (
        (UNET_PREFIX, unet_modules(config)) if part == "unet" else (VAE_PREFIX, vae_modules(config))
    )
    plain = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    result = {}
    for name, new in _renamed(part, _inverse(table), plain).items():
        convolved = part == "vae" and VAE_CONVOLVED.fullmatch(name)
        result[new] = plain[name].flatten(1) if convolved else plain[name]
    return result


def unet_modules(config: Config) -> dict[str, str]:
    """Maps modules of diffusers' UNet to LDM's; what lies in a transformer keeps its name there."""
    table = dict(UNET_ENDS)
    table |= _within("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    table |= _within("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    down, up = config["down_block_types"], config["up_block_types"]
    layers = config["layers_per_block"]
    counts = [layers] * len(down) if isinstance(layers, int) else list(layers)
    number = 1
    for i, (kind, count) in enumerate(zip(down, counts, strict=True)):
        for j in range(count):
            here = f"down_blocks.{i}"
            table |= _within(f"{here}.resnets.{j}", f"input_blocks.{number}.0", UNET_RESNET)
            if has_attention(kind):
                table[f"{here}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if i < len(down) - 1:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, (kind, count) in enumerate(zip(up, reversed(counts), strict=True)):
        for j in range(count + 1):
            here = f"up_blocks.{i}"
            table |= _within(f"{here}.resnets.{j}", f"output_blocks.{number}.0", UNET_RESNET)
            if has_attention(kind):
                table[f"{here}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if i < len(up) - 1:
            after = 2 if has_attention(kind) else 1
            conv = f"output_blocks.{number - 1}.{after}.conv"
            table[f"up_blocks.{i}.upsamplers.0.conv"] = conv
    return table


def vae_modules(config: Config) -> dict[str, str]:
    """Maps modules of diffusers' AutoencoderKL to LDM's."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table[f"{side}.conv_in"] = f"{side}.conv_in"
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        table[f"{side}.conv_out"] = f"{side}.conv_out"
        table |= _within(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
        for k in range(2):
            resnet, block = f"{side}.mid_block.resnets.{k}", f"{side}.mid.block_{k + 1}"
            table |= _within(resnet, block, VAE_RESNET)
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        ldm_down, ldm_up = f"encoder.down.{i}", f"decoder.up.{levels - 1 - i}"
        for j in range(layers):
            table |= _within(f"{down}.resnets.{j}", f"{ldm_down}.block.{j}", VAE_RESNET)
        for j in range(layers + 1):
            table |= _within(f"{up}.resnets.{j}", f"{ldm_up}.block.{j}", VAE_RESNET)
        if i < levels - 1:
            table[f"{down}.downsamplers.0.conv"] = f"{ldm_down}.downsample.conv"
            table[f"{up}.upsamplers.0.conv"] = f"{ldm_up}.upsample.conv"
    return table


def published_text_name(name: str) -> str:
    """Returns the name of a text encoder's weight as published files have it."""
    if name.startswith("text_projection"):
        return name
    return f"text_model.{name.removeprefix('text_model.')}"


def is_open_clip(config: Config) -> bool:
    """Whether a text encoder is OpenCLIP's, as in SD 2.x: its activation is gelu."""
    return bool(config["hidden_act"] == "gelu")


def ema_name(name: str) -> str:
    """Returns the key of the average of a UNet's weight in a single file: without dots."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def has_attention(block_type: str) -> bool:
    """Whether a UNet's block of that type holds transformers."""
    return "CrossAttn" in block_type


def _open_clip_modules(config: Config) -> dict[str, str]:
    table = dict(OPEN_CLIP_ENDS)
    for n in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{n}"
        table |= _within(layer, f"transformer.resblocks.{n}", OPEN_CLIP_LAYER)
    return table


def _to_open_clip(config: Config, state: State) -> dict[str, Tensor]:
    names = [name for name in state if not ONE_OF_QKV.fullmatch(name)]
    table = _renamed("text_encoder", _open_clip_modules(config), names)
    result = {new: state[name] for name, new in table.items()}
    if "text_projection" in result:
        result["text_projection"] = result["text_projection"].T.contiguous()
    for name in state:
        if (match := ONE_OF_QKV.fullmatch(name)) and match[2] == "q":
            layer, kind = match[1], match[3]
            number = layer.rpartition(".")[2]
            rows = [state[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            result[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = torch.cat(rows)
    return result


def _from_open_clip(config: Config, state: State) -> dict[str, Tensor]:
    names = [name for name in state if not QKV.fullmatch(name)]
    table = _renamed("text_encoder", _inverse(_open_clip_modules(config)), names)
    result = {new: state[name] for name, new in table.items()}
    if "text_projection.weight" in result:
        result["text_projection.weight"] = result["text_projection.weight"].T
    for name, tensor in state.items():
        if match := QKV.fullmatch(name):
            layer = f"text_model.encoder.layers.{match[1].rpartition('.')[2]}"
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{layer}.self_attn.{letter}_proj.{match[2]}"] = rows
    return result


def _within(module: str, ldm: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{name}": f"{ldm}.{new}" for name, new in table.items()}


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: name for name, new in table.items()}


def _renamed(part: Part, table: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Maps names to what they are called by `table`; UserError where one has no name there."""
    result = renamed(names, table)
    if unknown := [name for name in names if name not in result]:
        raise UserError(
            f"{part}: {len(unknown)} weights are of no module of Stable Diffusion's, such as "
            f"{unknown[0]}; single files are read and written of plain text-to-image models alone"
        )
    return result
