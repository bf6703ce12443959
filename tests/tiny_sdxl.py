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

from blackpoint.sampling.checkpoints.single_file import TOKENIZER
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from tests.tiny_pipeline import NUM_TOKENS, save_tiny_tokenizer, tiny_vae, tokens_and_merges

WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
NUM_LAYERS = {"text_encoder": 3, "text_encoder_2": 4}
PROJECTION = 24
SIZE_WIDTH = 8
"""Of the embedding of each of the six sizes: 256 in SDXL."""
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": sum(WIDTHS.values()),
    "use_linear_projection": True,
    "norm_num_groups": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": 6 * SIZE_WIDTH + PROJECTION,
}
EOT_AS_PUBLISHED = 2
"""eos_token_id of the published text encoders: not the token's id, which is the highest."""


def make_tiny_sdxl(
    folder: Path,
    seed: int = 0,
    *,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    texts: dict[str, dict[str, Any]] | None = None,
    clip_words: Path | None = None,
    scheduler: Any = None,
) -> Path:
    """Writes a random SDXL pipeline folder and returns it; dicts override config entries.

    `texts` are those of text encoders by name, `clip_words` is a tokenizer's folder. Without a
    `scheduler` it is the published Euler's: epsilon, non-zero terminal SNR.
    """
    tokenizers = {}
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        if clip_words is None:
            save_tiny_tokenizer(folder / name, pad_token)
        source = clip_words or folder / name
        tokenizers[name] = CLIPTokenizer.from_pretrained(source, pad_token=pad_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DConditionModel(**(UNET | (unet or {})))
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae({"scaling_factor": 0.13025, "force_upcast": True, **(vae or {})}),
            text_encoder=CLIPTextModel(_text_config("text_encoder", "quick_gelu", texts)),
            text_encoder_2=CLIPTextModelWithProjection(
                _text_config("text_encoder_2", "gelu", texts)
            ),
            unet=network,
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


def make_carried_sdxl(folder: Path, scheduler: Any = None, seed: int = 0) -> Path:
    """Writes a small SDXL that a single file can carry: heads of 64 channels, CLIP's words.

    Its projection is square, as SDXL's: no shape tells which way round it is.
    """
    widths = {"text_encoder": 64, "text_encoder_2": 128}
    unet = {
        "block_out_channels": (64, 128, 128),
        "attention_head_dim": [1, 2, 2],
        "cross_attention_dim": sum(widths.values()),
        "norm_num_groups": 32,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + widths["text_encoder_2"],
    }
    texts = {
        name: {
            "vocab_size": 49_408,
            "max_position_embeddings": 77,
            "hidden_size": width,
            "num_attention_heads": width // 64,
            "projection_dim": width,
        }
        for name, width in widths.items()
    }
    vae = {"block_out_channels": (32, 32), "norm_num_groups": 32}
    words = {"clip_words": TOKENIZER, "scheduler": scheduler}
    return make_tiny_sdxl(folder, seed, unet=unet, vae=vae, texts=texts, **words)


def _text_config(
    name: str, activation: str, texts: dict[str, dict[str, Any]] | None
) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokens_and_merges()[0]),
            "hidden_size": WIDTHS[name],
            "intermediate_size": 2 * WIDTHS[name],
            "num_hidden_layers": NUM_LAYERS[name],
            "num_attention_heads": 2,
            "max_position_embeddings": NUM_TOKENS,
            "hidden_act": activation,
            "projection_dim": PROJECTION,
            "bos_token_id": 0,
            "eos_token_id": EOT_AS_PUBLISHED,
            "pad_token_id": 1,
            **(texts or {}).get(name, {}),
        }
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
