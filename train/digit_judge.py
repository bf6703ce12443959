"""A classifier of composed digits in colour: digit, ink and background; its features judge samples.

Unlike the digit reader (sampling/evaluation/digit_reader.py), which is made blind to ink and
background, it sees the picture as it is, and so does a distance of feature distributions.
"""

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from data.digits import BACKGROUNDS, DIGIT_NAMES, INKS

NUM_FEATURES = 128
NUM_LABELS = (len(DIGIT_NAMES), len(INKS), len(BACKGROUNDS))


class DigitJudge(nn.Module):
    """Four convolutions, a layer of features and one head for each label.

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
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, count) for count in NUM_LABELS)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.layers(2 * pixels - 1)

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor) -> list[float]:
        """Returns the share of right answers for each label of uint8 images and labels (N, 3)."""
        self.eval()
        features = torch.cat([self(chunk) for chunk in images.split(256)])
        read = torch.stack([head(features).argmax(dim=1) for head in self.heads], dim=1)
        return (read == labels).double().mean(dim=0).tolist()


def labels_of(images: np.ndarray, captions: list[str], digits: np.ndarray) -> Tensor:
    """Returns digit, ink and background of composed images, (N, 3) int64.

    Captions name the ink; the background, which some leave out, is read from the corner.
    """
    inks = [list(INKS).index(caption.split()[1]) for caption in captions]
    levels = np.asarray(list(BACKGROUNDS.values()))
    corners = images[:, 0, 0, :1] / 255
    backgrounds = np.abs(corners - levels).argmin(axis=1)
    return torch.from_numpy(np.stack([digits, inks, backgrounds], axis=1).astype(np.int64))


def train_digit_judge(
    images: Tensor, labels: Tensor, seed: int = 0, num_steps: int = 1500, batch_size: int = 64
) -> DigitJudge:
    """Trains on uint8 images (N, 3, 32, 32) and labels (N, 3), shifted by up to 2 px at random."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = DigitJudge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps)
    for _ in track(range(num_steps), description="digit judge"):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        features = judge(images[rows].roll(shift, dims=(2, 3)))
        errors = [
            F.cross_entropy(head(features), labels[rows, place])
            for place, head in enumerate(judge.heads)
        ]
        loss = torch.stack(errors).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
    return judge.eval()
