"""Writes Stable Diffusion with random weights: python -m
blackpoint.scripts.measurements.make_random_base output=FOLDER.

The architectures are the published ones, to the parameter: what runs on such a folder runs on the
real model, in the same time and memory. Only pictures cannot be had from it. One tensor after the
other is drawn, so that no more than one part (UNet, autoencoder, text encoder) is ever in memory.

Weights are uniform in +-1/sqrt(fan_in), as PyTorch's own layers start; norms are 1 and biases 0.
Activations then stay far inside fp16's range and outputs vary.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import MISSING
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blackpoint.sampling.checkpoints.ldm_keys import is_open_clip, published_text_name
from blackpoint.sampling.checkpoints.loading import TOKENIZERS, load_tokenizer, save_tokenizer
from blackpoint.sampling.checkpoints.saving import (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    write_json,
)
from blackpoint.sampling.checkpoints.single_file import OPEN_CLIP_PAD, TOKENIZER
from blackpoint.sampling.export.placement import moved_into_place, require_empty
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script

Name = Literal["sd15", "sd21_base", "sd21", "sdxl", "medium", "small", "small_21", "small_xl"]
Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]

NUM_TOKENS, PROMPT_TOKENS = 49_408, 77
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_21 = UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {  # CLIP ViT-L/14
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": PROMPT_TOKENS,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
TEXT_21 = TEXT | {  # OpenCLIP ViT-H/14 without its last layer
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
TEXT_XL_2 = TEXT | {  # OpenCLIP ViT-bigG/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
VAE_XL = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
VAE_SMALL = VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
TEXT_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "projection_dim": 64,
}
TEXT_SMALL_2 = TEXT_SMALL | {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "projection_dim": 128,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SCHEDULER_XL = SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Architecture:
    """The configs of the parts; SDXL alone has a second text encoder."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder_2: dict[str, Any] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        parts: tuple[Part, ...] = ("unet", "vae", "text_encoder")
        return parts if self.text_encoder_2 is None else (*parts, "text_encoder_2")


ARCHITECTURES: dict[Name, Architecture] = {
    "sd15": Architecture(UNET, VAE, TEXT, SCHEDULER),
    "sd21_base": Architecture(UNET_21, VAE, TEXT_21, SCHEDULER),
    "sd21": Architecture(
        UNET_21 | {"sample_size": 96, "upcast_attention": True},
        VAE | {"sample_size": 768},
        TEXT_21,
        SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ),
    "sdxl": Architecture(UNET_XL, VAE_XL, TEXT, SCHEDULER_XL, TEXT_XL_2),
    # The same blocks, a tenth as wide: for trying out what is meant for the others.
    "small": Architecture(
        UNET | {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64},
        VAE_SMALL,
        TEXT | TEXT_SMALL,
        SCHEDULER,
    ),
    # Of about 140 million parameters: large beside what a program takes without a model.
    "medium": Architecture(
        UNET | {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 64},
        VAE_SMALL,
        TEXT | TEXT_SMALL,
        SCHEDULER,
    ),
    "small_21": Architecture(
        UNET_21
        | {
            "block_out_channels": (64, 64, 128, 128),
            "attention_head_dim": (1, 1, 2, 2),
            "cross_attention_dim": 64,
        },
        VAE_SMALL,
        TEXT_21 | TEXT_SMALL,
        SCHEDULER,
    ),
    "small_xl": Architecture(
        UNET_XL
        | {
            "sample_size": 64,
            "block_out_channels": (64, 128, 128),
            "attention_head_dim": [1, 2, 2],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 64 + 128,
            "projection_class_embeddings_input_dim": 6 * 256 + 128,
        },
        VAE_XL | VAE_SMALL | {"scaling_factor": 0.13025},
        TEXT | TEXT_SMALL,
        SCHEDULER_XL,
        TEXT_XL_2 | TEXT_SMALL_2,
    ),
}


@dataclass
class RandomBaseConfig:
    """A folder with a published architecture and random weights."""

    architecture: Name = "sd15"
    """sd15; sd21_base (512 px, epsilon) or sd21 (768 px, v-prediction); sdxl; small, small_21 and
    small_xl: the blocks of 1.5, 2.1 and XL, a tenth as wide; medium: those of 1.5, 0.4 times as
    wide."""
    output: str = MISSING
    """Folder to write; must be empty or not exist."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the weights."""
    seed: int = 0
    """Seed of the weights."""


def build_on_meta(architecture: Architecture, part: Part) -> torch.nn.Module:
    """Builds a part without memory for its weights."""
    with torch.device("meta"):
        match part:
            case "unet":
                return UNet2DConditionModel(**architecture.unet)
            case "vae":
                return AutoencoderKL(**architecture.vae)
            case "text_encoder":
                return CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
            case "text_encoder_2":
                assert architecture.text_encoder_2 is not None
                config = CLIPTextConfig(**architecture.text_encoder_2)
                return CLIPTextModelWithProjection(config)


def random_weights(
    shapes: dict[str, torch.Size], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yields a weight for each name: uniform in +-1/sqrt(fan_in), norms 1, biases 0."""
    for name, shape in shapes.items():
        if len(shape) > 1:
            bound = shape[1:].numel() ** -0.5
            weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        else:
            weight = torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
        yield name, weight.to(dtype)


def write_part(
    folder: Path,
    architecture: Architecture,
    part: Part,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Writes config.json and the safetensors of one part."""
    model: Any = build_on_meta(architecture, part)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = dict(random_weights(shapes, dtype, generator))
    if part.startswith("text_encoder"):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / part)
        # the published files are of a CLIPTextModel that holds its layers one level deeper
        tensors = {published_text_name(name): tensor for name, tensor in tensors.items()}
        file = folder / part / "model.safetensors"
    else:
        model.save_config(folder / part)
        file = folder / part / "diffusion_pytorch_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})


def write_tokenizers(folder: Path, architecture: Architecture) -> None:
    """Writes CLIP's tokenizer for each text encoder, as the published folders have it."""
    for part, name in TOKENIZERS.items():
        if config := getattr(architecture, part):
            pad = {"pad_token": OPEN_CLIP_PAD} if is_open_clip(config) else {}
            save_tokenizer(load_tokenizer(TOKENIZER, config, **pad), folder, name)


def make(config: RandomBaseConfig) -> Path:
    """Writes the pipeline folder and returns it; it appears whole or not at all."""
    architecture, output = ARCHITECTURES[config.architecture], Path(config.output)
    require_empty(output)
    dtype, generator = getattr(torch, config.dtype), torch.Generator().manual_seed(config.seed)
    index = STABLE_DIFFUSION_XL if architecture.text_encoder_2 else STABLE_DIFFUSION
    with moved_into_place(output) as folder:
        for part in architecture.parts:
            write_part(folder, architecture, part, dtype, generator)
        write_tokenizers(folder, architecture)
        write_json(folder / "scheduler" / "scheduler_config.json", architecture.scheduler)
        scheduler = {"scheduler": ["diffusers", architecture.scheduler["_class_name"]]}
        write_json(folder / "model_index.json", index | scheduler)
    return output


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    num_others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(num_others)]


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("make_random_base", lambda: print(make(load(RandomBaseConfig, argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
