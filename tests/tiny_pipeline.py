"""A tiny random Stable Diffusion folder, for tests of everything that loads one.

Architecture as SD 1.x (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer), sizes as
small as the classes allow: latents (4, 8, 8), images of 16 px, prompts of 16 tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COLORS = ["black", "white", "gray", "dark", "light", "red", "blue", "yellow"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["a", "on", "background", "night", "snow", "photo", "of", "the", *COLORS, *DIGITS]
NUM_TOKENS = 16
TEXT_WIDTH = 32

SD15_SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def make_tiny_pipeline(
    folder: Path,
    seed: int = 0,
    *,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    variant: str | None = None,
) -> Path:
    """Writes a random SD 1.5 pipeline folder and returns it; the dicts override config entries.

    `scheduler` overrides entries of SD 1.5's own scheduler_config.json (epsilon, non-zero terminal
    SNR, no timestep_spacing). variant="fp16" writes half-precision `*.fp16.safetensors` files.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save_modules(folder, unet or {}, vae or {}, text_encoder or {}, variant)
    save_tiny_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    scheduler_config = SD15_SCHEDULER_CONFIG | (scheduler or {})
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.1",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler_config["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder


def _save_modules(
    folder: Path,
    unet: dict[str, Any],
    vae: dict[str, Any],
    text_encoder: dict[str, Any],
    variant: str | None,
) -> None:
    tiny_unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": TEXT_WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **unet,
        }
    )
    autoencoder = tiny_vae(vae)
    num_tokens = len(tokens_and_merges()[0])
    tiny_text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **{
                "vocab_size": num_tokens,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": NUM_TOKENS,
                "bos_token_id": num_tokens - 2,
                "eos_token_id": num_tokens - 1,
                "pad_token_id": num_tokens - 1,
                **text_encoder,
            }
        )
    )
    modules = {"unet": tiny_unet, "vae": autoencoder, "text_encoder": tiny_text_encoder}
    for name, module in modules.items():
        if variant == "fp16":
            module.half()
        module.save_pretrained(folder / name, variant=variant)


def tiny_vae(entries: dict[str, Any]) -> AutoencoderKL:
    """Returns a random autoencoder of 2 px per latent; `entries` override those of its config."""
    return AutoencoderKL(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            **entries,
        }
    )


def tokens_and_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """The vocabulary of a byte-level BPE in which each of WORDS is one token."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0] if len(word) > 1 else word + "</w>"
        for right in (*word[1:-1], word[-1] + "</w>")[: len(word) - 1]:
            merges.append((left, right))
            left += right
    merges = list(dict.fromkeys(merges))
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [left + right for left, right in merges]
    return [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"], merges


def save_tiny_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = tokens_and_merges()
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token=pad_token,
        model_max_length=NUM_TOKENS,
    )
    tokenizer.save_pretrained(folder)


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_overflowing_pipeline(folder: Path) -> Path:
    """Writes a pipeline in float32 whose autoencoder, both halves, leaves the range of fp16.

    The norms that follow bring the values back.
    """
    return make_autoencoder_overflow(make_tiny_pipeline(folder))


def make_autoencoder_overflow(folder: Path) -> Path:
    """Rewrites a folder's autoencoder so that both its halves leave the range of fp16."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
            conv.weight.mul_(1e4)
            conv.bias.fill_(6e4)
    vae.save_pretrained(folder / "vae")
    return folder
