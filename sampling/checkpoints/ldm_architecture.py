"""The configs of the networks in a single file, from the shapes of their weights.

What no shape tells is as latent-diffusion builds it: 8 attention heads in the UNet of SD 1.x, heads
of 64 channels in SD 2.x, whose projections are linear, and in CLIP; CLIP's activation is quick_gelu
and OpenCLIP's gelu; latents are scaled by 0.18215. OpenCLIP is read to its last layer but one.
SDXL has heads as SD 2.x, latents scaled by 0.13025, and all layers of both text encoders.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from blackpoint.data.files.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
"""Of one part, by its names in the layout without prefix."""

HEADS, HEAD_WIDTH, MOST_GROUPS = 8, 64, 32
SCALING_FACTOR, XL_SCALING_FACTOR = 0.18215, 0.13025
SIZE_WIDTH = 256
"""Of the embedding of each of the sizes that SDXL's UNet is told."""
OPEN_CLIP_LAYERS = 23
"""Of the 24 layers of OpenCLIP's ViT-H, those that SD 2.x uses."""


def unet_config(
    shapes: Shapes, side_px: int, vae_factor: int, is_xl: bool = False
) -> dict[str, Any]:
    """Returns unet/config.json; `side_px` is the side of images that the model was made for."""
    levels = list(_levels(shapes))
    widths = [width for width, _, _ in levels]
    counts = [count for _, count, _ in levels]
    attention = [attends for _, _, attends in levels]
    depths = [_depth(shapes, range(*span)) for span in _spans(counts)]
    projection = next((s for n, s in shapes.items() if n.endswith(".proj_in.weight")), ())
    context = {s[1] for n, s in shapes.items() if n.endswith(".attn2.to_k.weight")}
    if len(context) != 1:
        raise UserError(f"its UNet attends to texts of {len(context)} widths, not of one")
    is_linear = len(projection) == 2
    heads = [max(width // HEAD_WIDTH, 1) for width in widths]
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": max(side_px // vae_factor, 1),
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _one_or_all(counts),
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context.pop(),
        "attention_head_dim": heads if is_linear else HEADS,
        "use_linear_projection": is_linear,
        "norm_num_groups": _groups(widths),
        # As in SD 2.1 of 768 px: its attention overflows in float16. It changes formats alone.
        "upcast_attention": is_linear and side_px >= 768 and not is_xl,
    }
    if is_xl:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    if any(depth > 1 for depth in depths):
        config["transformer_layers_per_block"] = _one_or_all(depths)
    return config


def vae_config(shapes: Shapes, scaling_factor: float = SCALING_FACTOR) -> dict[str, Any]:
    """Returns vae/config.json."""
    levels = _numbers(shapes, r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in levels]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": len(_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\.")),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": _groups(widths),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": scaling_factor,
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """Returns text_encoder/config.json of SD 1.x or SDXL, from transformers' published names."""
    embeddings = "text_model.embeddings"
    return _text_config(
        shapes[f"{embeddings}.token_embedding.weight"],
        shapes[f"{embeddings}.position_embedding.weight"][0],
        shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        len(_numbers(shapes, r"text_model\.encoder\.layers\.(\d+)\.")),
        "quick_gelu",
    )


def open_clip_config(shapes: Shapes, is_whole: bool) -> dict[str, Any]:
    """Returns text_encoder/config.json of SD 2.x; `is_whole` if the last layer is there, too."""
    count = len(_numbers(shapes, r"transformer\.resblocks\.(\d+)\."))
    if count > OPEN_CLIP_LAYERS:
        count = OPEN_CLIP_LAYERS
    elif is_whole and 1 < count < OPEN_CLIP_LAYERS:
        count -= 1
    return _text_config(
        shapes["token_embedding.weight"],
        shapes["positional_embedding"][0],
        shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        count,
        "gelu",
    )


def second_text_config(shapes: Shapes) -> dict[str, Any]:
    """Returns text_encoder_2/config.json of SDXL, from OpenCLIP's names."""
    config = _text_config(
        shapes["token_embedding.weight"],
        shapes["positional_embedding"][0],
        shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        len(_numbers(shapes, r"transformer\.resblocks\.(\d+)\.")),
        "gelu",
    )
    names = {"architectures": ["CLIPTextModelWithProjection"]}
    return config | names | {"projection_dim": shapes["text_projection"][1]}


def _text_config(
    tokens: tuple[int, ...], positions: int, intermediate: int, layers: int, activation: str
) -> dict[str, Any]:
    width = tokens[1]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokens[0],
        "hidden_size": width,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": width if activation == "quick_gelu" else 512,
        # As published: a text ends at its largest id.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _levels(shapes: Shapes) -> Iterable[tuple[int, int, bool]]:
    """Yields width, number of resnets and whether there is attention of each level of the UNet."""
    width, kinds = 0, list[bool]()
    numbers = _numbers(shapes, r"input_blocks\.(\d+)\.")
    for number in numbers[1:]:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            yield width, len(kinds), _same(kinds)
            kinds = []
        else:
            width = shapes[f"input_blocks.{number}.0.out_layers.3.weight"][0]
            kinds.append(f"input_blocks.{number}.1.proj_in.weight" in shapes)
    yield width, len(kinds), _same(kinds)


def _same(kinds: list[bool]) -> bool:
    if len(set(kinds)) != 1:
        raise UserError("a level of its UNet has attention in some of its blocks alone, or none")
    return kinds[0]


def _spans(counts: list[int]) -> Iterable[tuple[int, int]]:
    """Yields the input blocks of each level, from the first to after the last."""
    start = 1
    for count in counts:
        yield start, start + count
        start += count + 1


def _depth(shapes: Shapes, blocks: Iterable[int]) -> int:
    """Returns how many transformer blocks follow one another in a level's attention; at least 1."""
    numbers = "|".join(map(str, blocks))
    pattern = rf"input_blocks\.({numbers})\.1\.transformer_blocks\.(\d+)\."
    found = {int(match[2]) for name in shapes if (match := re.match(pattern, name))}
    return max(len(found), 1)


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """Returns the numbers that names have there, which are 0, 1, 2, ...; KeyError if not."""
    found = sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})
    if not found or found != list(range(len(found))):
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return found


def _groups(widths: list[int]) -> int:
    return math.gcd(MOST_GROUPS, *widths)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
