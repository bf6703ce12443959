"""The models of the GPU bench: published architectures, with random weights made on the device.

Nothing is copied from the host but the tokenizers' words. What a UNet computes is counted on the
meta device, where attention is counted as two products whichever kernel computes it: the FLOPs of a
row do not depend on where it is measured.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blackpoint.sampling.checkpoints.loading import Part, load_tokenizer
from blackpoint.sampling.checkpoints.single_file import OPEN_CLIP_PAD, TOKENIZER
from blackpoint.sampling.conditioning import Conditioning
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.measurements.make_random_base import (
    ARCHITECTURES,
    PROMPT_TOKENS,
    TEXT,
    TEXT_21,
    TEXT_SMALL,
    VAE,
    VAE_SMALL,
)

Work = Literal["forward", "full", "lora"]
"""A forward pass; one with the backward pass of all weights; one with that of activations alone,
which is what adapters need beside their own, small products."""
UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
TEXT_XL = TEXT_21 | {  # OpenCLIP ViT-bigG/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SD15, SMALL = ARCHITECTURES["sd15"], ARCHITECTURES["small"]
WIDTH = int(TEXT_SMALL["hidden_size"])
UNET_SMALL = SMALL.unet | {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
UNET_XL_SMALL = UNET_XL | {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 2 * WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}


@dataclass(frozen=True, eq=False)
class Family:
    """The configs of a model's parts, and the batches that are measured."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    images: int
    """Of a training step."""
    samples: int
    """Of a batch that is sampled."""

    @property
    def is_xl(self) -> bool:
        return len(self.text_encoders) > 1

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return 8 * int(self.unet["sample_size"])


# As with the autoencoder that people put into SDXL for half precision: not forced to float32.
VAE_XL = {"scaling_factor": 0.13025, "force_upcast": False}
FULL_SIZE = {
    "sd15": Family(SD15.unet, SD15.vae, (SD15.text_encoder,), 16, 4),
    "sdxl": Family(UNET_XL, VAE | VAE_XL | {"sample_size": 1024}, (TEXT, TEXT_XL), 4, 2),
}
SMALL_FORM = {
    "sd15": Family(UNET_SMALL, SMALL.vae, (SMALL.text_encoder,), 2, 2),
    "sdxl": Family(
        UNET_XL_SMALL, VAE_SMALL | VAE_XL, (TEXT | TEXT_SMALL, TEXT_XL | TEXT_SMALL), 2, 2
    ),
}


@dataclass(frozen=True)
class RandomParts:
    """Stands where a pipeline's files would: encoders get random weights when they are asked for.

    Training from cached latents asks for none.
    """

    family: Family
    device: torch.device

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the config of NAME/config.json."""
        family, part = self.family, name.partition("/")[0]
        configs = (family.vae, *family.text_encoders)
        return dict(zip(("vae", "text_encoder", "text_encoder_2"), configs, strict=False))[part]

    def weight_files(self, part: str) -> list[Any]:
        return []

    def load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """Makes a part on the device."""
        config = self.read_json(part)
        with self.device:
            model = kind(**config) if part == "vae" else kind(CLIPTextConfig(**config))
        return model.to(dtype)


def build(family: Family, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
    """Returns a model with random weights, to the zero-SNR process."""
    parts: Any = RandomParts(family, device)
    with device:
        unet = UNet2DConditionModel(**family.unet).to(dtype)
    vae = Part(AutoencoderKL, parts, "vae", dtype)
    texts = [Part(CLIPTextModel, parts, "text_encoder", dtype)]
    words = [load_tokenizer(TOKENIZER, family.text_encoders[0])]
    process = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
    second: dict[str, Any] = {}
    if family.is_xl:
        texts.append(Part(CLIPTextModelWithProjection, parts, "text_encoder_2", dtype))
        words.append(load_tokenizer(TOKENIZER, family.text_encoders[1], pad_token=OPEN_CLIP_PAD))
        second = {"text_encoder_2": texts[1], "tokenizer_2": words[1]}
    return DiffusionModel(unet, vae, texts[0], words[0], process, **second)


def conditioning(family: Family, rows: int, device: torch.device | str) -> Conditioning:
    """Returns random embeddings of `rows` prompts, float32."""
    embeds = torch.randn(rows, PROMPT_TOKENS, family.unet["cross_attention_dim"], device=device)
    if not family.is_xl:
        return Conditioning(embeds)
    width = family.text_encoders[1]["projection_dim"]
    return Conditioning(embeds, torch.randn(rows, width, device=device))


@functools.cache
def unet_flops(family: Family, work: Work) -> int:
    """Returns the FLOPs of the UNet per image, two a multiplication with its addition."""
    side = family.unet["sample_size"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.unet).requires_grad_(work == "full")
        x = torch.empty(1, 4, side, side, requires_grad=work == "lora")
        condition = conditioning(family, 1, "meta")
        others = condition.unet_arguments(family.resolution, family.resolution)
        with FlopCounterMode(display=False) as counter:
            t = torch.zeros(1, dtype=torch.long)
            output = unet(x, t, condition.prompt_embeds, **others, return_dict=False)[0]
            if work != "forward":
                output.sum().backward()
    return counter.get_total_flops()
