"""Two readers of digits, which judge images of the embedded model, and their training.

A reader must not care about ink or background. An image of a digit is
    image = background + mask (ink - background),
so |image - background| over colour channels, divided by its largest value, is the mask itself
whatever the two colours are. That contrast map, 32x32 pixels, is all that a reader sees. The
background is the median colour of the border.

The second reader has another architecture and was trained on digits that neither the first one nor
the embedded model was trained on, so it can judge what was searched for with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blackpoint.data.files.errors import UserError

WEIGHTS_NAME = "model.safetensors"
Reader = TypeVar("Reader", bound=nn.Module)
SIDE_PX = 32
WIDTH, NUM_LAYERS = 512, 3
SMALLEST_CONTRAST = (
    0.02  # below about five gray levels per image is blank, and is not amplified into noise
)


def contrast_map(images: Tensor) -> Tensor:
    """Returns how far each pixel is from its image's background, 1 for the farthest.

    images: (N, 3, H, W) float in [0, 1] -> (N, 1, 32, 32) float in [0, 1].
    """
    size = (SIDE_PX, SIDE_PX)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    rows = torch.cat([images[..., :1, :], images[..., -1:, :]], dim=-1).flatten(2)
    columns = torch.cat([images[..., :, :1], images[..., :, -1:]], dim=-2).flatten(2)
    background = (
        torch.cat([rows, columns], dim=-1).median(dim=-1).values[..., None, None]
    )  # (N, 3, 1, 1)
    # The norm's own gradient is 0 where it is 0; that of a square root is not a number.
    distance = torch.linalg.vector_norm(images - background, dim=1, keepdim=True)  # (N, 1, 32, 32)
    farthest = distance.amax(dim=(1, 2, 3), keepdim=True)
    return distance / farthest.clamp(min=SMALLEST_CONTRAST)


class DigitReader(nn.Module):
    """Reads one digit from each image: four convolutions and a linear layer, about 150,000
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1), nn.GroupNorm(8, 48), nn.SiLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.SiLU(), nn.MaxPool2d(2),
            nn.Conv2d(96, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.SiLU(),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, 10) for images (N, 3, H, W) float in [0, 1]."""
        return self.logits(contrast_map(images))

    def logits(self, contrast: Tensor) -> Tensor:
        """Returns logits (N, 10) for contrast maps (N, 1, 32, 32)."""
        return self.classifier(self.features(contrast))

    @torch.inference_mode()
    def read(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Returns the digit that each image shows, (N,) int64, for images (N, 3, H, W) float in [0,
        1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"images: {images.dtype} {tuple(images.shape)} can't be read; "
                "give float (N, 3, H, W) in [0, 1]"
            )
        self.eval()
        digits = [self(chunk.float()).argmax(dim=1) for chunk in images.split(batch_size)]
        return torch.cat(digits) if digits else torch.empty(0, dtype=torch.int64)

    @classmethod
    def load(cls, folder: str | Path) -> DigitReader:
        """Loads the reader from `folder/model.safetensors`; every key must match."""
        return load_weights(cls(), folder)


class DigitPerceptron(nn.Module):
    """Three dense layers of 512 and a head, 1,060,000 parameters.

    Called on images (N, 3, H, W) in [0, 1], it returns logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before in [SIDE_PX**2] + [WIDTH] * (NUM_LAYERS - 1):
            layers += [nn.Linear(before, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(0.1)]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(contrast_map(images))

    def logits(self, contrast: Tensor) -> Tensor:
        """Returns logits (N, 10) for contrast maps (N, 1, 32, 32)."""
        return self.layers(contrast)

    @classmethod
    def load(cls, folder: str | Path) -> DigitPerceptron:
        """Loads the reader from `folder/model.safetensors`; every key must match."""
        return load_weights(cls(), folder)


def load_weights(reader: Reader, folder: str | Path) -> Reader:
    """Fills a reader from `folder/model.safetensors`, for evaluation; every key must match."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(
            f"digit_reader: {path} does not exist; name a folder that holds {WEIGHTS_NAME}"
        )
    try:
        reader.load_state_dict(load_file(path), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"digit_reader: {path} does not hold a digit reader ({error})") from error
    return reader.eval()


def save_weights(reader: nn.Module, folder: str | Path) -> Path:
    """Writes `folder/model.safetensors` and returns its path."""
    path = Path(folder) / WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in reader.state_dict().items()}, path)
    return path


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
