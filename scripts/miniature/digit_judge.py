"""A classifier of digits whose features judge samples: what KID is measured on.

The digit reader (scripts/miniature/digit_readers.py) is made blind to much of a picture. This one
is trained on the pictures that a generator is trained on, as they are, so that the distance of
feature distributions sees what the generator got wrong.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from blackpoint.scripts.miniature.digit_readers import load_weights

NUM_FEATURES, NUM_DIGITS = 128, 10


class DigitJudge(nn.Module):
    """Four convolutions, a layer of features and a head.

    Called on images (N, 3, 32, 32), uint8 or in [0, 1], it returns the features (N, 128), each
    within -1 and 1.
    """

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], (1, 2, 2, 2), strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(128 * 16, NUM_FEATURES), nn.Tanh()
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_DIGITS)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.layers(2 * pixels - 1)

    @classmethod
    def load(cls, folder: str | Path) -> DigitJudge:
        """Loads the judge from `folder/model.safetensors`; every key must match."""
        return load_weights(cls(), folder)


class DigitJudgeClasses(DigitJudge):
    """The same network, which returns the logits (N, 10) of the digits."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(super().forward(images))


def train_digit_judge(
    images: Tensor, labels: Tensor, seed: int = 0, num_steps: int = 1500, batch_size: int = 64
) -> DigitJudge:
    """Trains on uint8 images (N, 3, 32, 32) and labels (N,), shifted by up to 2 px at random."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = DigitJudge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps)
    for _ in track(range(num_steps), description="digit judge"):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        logits = judge.head(judge(images[rows].roll(shift, dims=(2, 3))))
        loss = F.cross_entropy(logits, labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
    return judge.eval()
