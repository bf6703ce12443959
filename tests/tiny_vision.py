"""Tiny random folders of the vision models that verifiers judge with, saved by transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

NUM_TOKENS = 16
IMAGE_PX = 32
LABELS = ("zero", "one", "tabby, tabby cat", "cat")


def make_tiny_clip(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Writes a CLIPModel folder with features of 24 numbers, prompts of 16 tokens, 32 px."""
    words: Any = CLIPTokenizer.from_pretrained(tokenizer)
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": NUM_TOKENS,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {"image_size": IMAGE_PX, "patch_size": 8}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config=text | sizes, vision_config=vision | sizes, projection_dim=24
        )
        model: Any = CLIPModel(config)
        spread_out(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_PX}, crop_size={"height": IMAGE_PX, "width": IMAGE_PX}
    ).save_pretrained(folder)
    return folder


def make_tiny_vit(folder: Path, seed: int = 0) -> Path:
    """Writes a ViTForImageClassification folder with the four LABELS, 32 px."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_PX,
            patch_size=8,
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
        model: Any = ViTForImageClassification(config)
        spread_out(model)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": IMAGE_PX, "width": IMAGE_PX}).save_pretrained(folder)
    return folder


def spread_out(model: Any) -> None:
    """Makes the weights larger than at the start of training, so that images are told apart."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5)


def eight_bit_images(num_images: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """Returns random images in [0, 1] with values that 8 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_images, 3, height, width), generator=generator) / 255


class ThreeColors(torch.nn.Module):
    """Is a model of images whose features, or logits, are the means of the three channels."""

    def forward(self, images: Tensor) -> Tensor:
        return 4 * images.mean(dim=(2, 3))
