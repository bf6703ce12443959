"""A tiny random SDXL folder, and the model assembled from its parts.

Architecture as SDXL's: a UNet of three levels with transformers at the lower two and size
conditioning, two CLIP text encoders (the second wider, with a projection that is not square) and
two tokenizers that differ in their padding. Latents (4, 8, 8), images of 16 px, prompts of 16
tokens. diffusers writes the folder.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from tests.tiny_pipeline import NUM_TOKENS, save_tiny_tokenizer, tiny_vae, tokens_and_merges

WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
NUM_LAYERS = {"text_encoder": 3, "text_encoder_2": 4}
PROJECTION = 24
SIZE_WIDTH = 8
"""Of the embedding of each of the six sizes: 256 in SDXL."""
EOT_AS_PUBLISHED = 2
"""eos_token_id of the published text encoders: not the token's id, which is the highest."""


def make_tiny_sdxl(
    folder: Path, seed: int = 0, *, vae: dict[str, Any] | None = None, scheduler: Any = None
) -> Path:
    """Writes a random SDXL pipeline folder and returns it; `vae` overrides config entries.

    Without a `scheduler` it is the published Euler's: epsilon, non-zero terminal SNR.
    """
    tokenizers = {}
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        save_tiny_tokenizer(folder / name, pad_token)
        tokenizers[name] = CLIPTokenizer.from_pretrained(folder / name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[1, 2, 4],
            cross_attention_dim=sum(WIDTHS.values()),
            use_linear_projection=True,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH,
            projection_class_embeddings_input_dim=6 * SIZE_WIDTH + PROJECTION,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae({"scaling_factor": 0.13025, "force_upcast": True, **(vae or {})}),
            text_encoder=CLIPTextModel(_text_config("text_encoder", "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_text_config("text_encoder_2", "gelu")),
            unet=unet,
            scheduler=scheduler
            or EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
            ),
            **tokenizers,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def _text_config(name: str, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens_and_merges()[0]),
        hidden_size=WIDTHS[name],
        intermediate_size=2 * WIDTHS[name],
        num_hidden_layers=NUM_LAYERS[name],
        num_attention_heads=2,
        max_position_embeddings=NUM_TOKENS,
        hidden_act=activation,
        projection_dim=PROJECTION,
        bos_token_id=0,
        eos_token_id=EOT_AS_PUBLISHED,
        pad_token_id=1,
    )


def assembled(folder: Path, process: Process, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """Returns the model of such a folder."""
    return DiffusionModel(
        UNet2DConditionModel.from_pretrained(folder / "unet").to(dtype),
        AutoencoderKL.from_pretrained(folder / "vae").to(dtype),
        CLIPTextModel.from_pretrained(folder / "text_encoder").to(dtype),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        process,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").to(
            dtype
        ),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )
