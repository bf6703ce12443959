"""Trains the readers of digits (sampling/evaluation/digit_*.py) on labelled images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.scripts.miniature.digit_reader import SIDE_PX, Reader, contrast_map


def jittered(contrast: Tensor, generator: torch.Generator) -> Tensor:
    """Returns contrast maps rotated (15 degrees), scaled (12 %), sheared and shifted (3 px) at
    random."""
    num_images = contrast.shape[0]

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(num_images, generator=generator) - 1) * limit

    angle, shear = uniform(0.26), uniform(0.15)
    width, height = 1 + uniform(0.12), 1 + uniform(0.12)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = uniform(3 * 2 / SIDE_PX), uniform(3 * 2 / SIDE_PX)
    rows = [
        torch.stack([cos * width, (shear - sin) * height, shift_x], dim=1),
        torch.stack([sin * width, cos * height, shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(contrast.shape), align_corners=False)
    return F.grid_sample(contrast, grid, align_corners=False)


def train_reader(
    make: Callable[[], Reader],
    images: Tensor,
    labels: Tensor | Sequence[int],
    seed: int = 0,
    num_steps: int = 2500,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> Reader:
    """Trains the reader that `make` gives on labelled images and returns it in evaluation mode.

    images: uint8 (N, 3, H, W); labels: N digits. AdamW under one cosine of the learning rate; the
    maps are jittered, and a little noise keeps the reader from relying on perfectly flat
    backgrounds.
    """
    targets = torch.as_tensor(labels, dtype=torch.int64)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(targets):
        raise UserError(
            f"images: {images.dtype} {tuple(images.shape)} with {len(targets)} labels can't be "
            "trained on; give uint8 (N, 3, H, W) and one label per image"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    maps = torch.cat([contrast_map(chunk.float() / 255) for chunk in images.split(512)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        reader = make().train()
        read: Any = reader.logits
        optimizer = torch.optim.AdamW(reader.parameters(), lr=learning_rate, weight_decay=0.02)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=learning_rate, total_steps=num_steps
        )
        for _ in track(range(num_steps), description="digit reader"):
            chosen = torch.randint(len(maps), (batch_size,), generator=generator)
            contrast = jittered(maps[chosen], generator)
            noise_std = 0.1 * torch.rand(batch_size, 1, 1, 1, generator=generator)
            contrast = contrast + noise_std * torch.randn(contrast.shape, generator=generator)
            loss = F.cross_entropy(read(contrast), targets[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
    return reader.eval()
