"""Builds a pixel-space UNet or U-ViT from diffusers' blocks (Hoogeboom et al. 2023, section 3.3).

All is stock UNet2DConditionModel: down- and up-sampling around it are the codec's
(sampling/pixels/pixel_codec.py), transformer blocks are its cross-attention levels, and a class
joins the embedding of t. As in the paper, the last layer of every branch starts at zero.
"""

import math

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import PLAIN, SingleFileConfig
from blackpoint.sampling.conditioning import NO_TEXT_WIDTH
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.pixels.pixel_codec import PixelCodec
from blackpoint.sampling.process import Process
from blackpoint.train.config.model_config import ModelConfig

MAX_NORM_GROUPS = 32


def build_pixel_model(
    config: ModelConfig,
    resolution: int,
    process: Process,
    single_file: SingleFileConfig = PLAIN,
) -> DiffusionModel:
    """Returns a model with random weights for images of `resolution` px, the same at every call.

    Raises UserError for a resolution that it cannot take.
    """
    codec = PixelCodec(config.codec, config.patch)
    multiple = config.patch * 2 ** (len(config.channels) - 1)
    if resolution % multiple:
        raise UserError(
            f"data.resolution={resolution}: must be a multiple of {multiple} px, which is "
            f"model.patch={config.patch} times 2 for each level of model.channels after the first"
        )
    text: DiffusionModel | None = None
    width = NO_TEXT_WIDTH
    if config.text_encoder is not None:
        text = DiffusionModel.load(
            config.text_encoder, with_unet=False, single_file=single_file, undecided="epsilon"
        )
        if text.tokenizer is None:
            raise UserError(f"model.text_encoder={config.text_encoder} has no text encoder")
        width = int(text.text_encoder.config.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = build_unet(config, resolution, width)
    form = PixelForm(codec, tuple(config.classes), text is not None)
    text_encoder = None if text is None else text.text_encoder
    tokenizer = None if text is None else text.tokenizer
    return DiffusionModel(unet, None, text_encoder, tokenizer, process, pixels=form)


def build_unet(config: ModelConfig, resolution: int, text_width: int) -> UNet2DConditionModel:
    """Returns the UNet alone, on positions of `patch` px."""
    codec = PixelCodec(config.codec, config.patch)
    depths = config.transformer_blocks
    attends = ["CrossAttn" if depth else "" for depth in depths]
    num_heads = [max(width // config.head_channels, 1) for width in config.channels]
    unet = UNet2DConditionModel(
        sample_size=resolution // config.patch,
        in_channels=codec.channels,
        out_channels=codec.channels,
        block_out_channels=tuple(config.channels),
        layers_per_block=tuple(config.blocks),
        transformer_layers_per_block=tuple(max(depth, 1) for depth in depths),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in attends),
        mid_block_type="UNetMidBlock2DCrossAttn" if depths[-1] else "UNetMidBlock2D",
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attends)),
        cross_attention_dim=text_width,
        attention_head_dim=tuple(num_heads),  # diffusers' name for the number of heads
        norm_num_groups=math.gcd(MAX_NORM_GROUPS, *config.channels),
        num_class_embeds=len(config.classes) + 1 if config.classes else None,
        resnet_time_scale_shift="scale_shift",
        use_linear_projection=True,
    )
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            assert isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet
