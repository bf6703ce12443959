"""A stand-in for a model: paints a square on a background that moves with its `pull` towards
gray."""

from dataclasses import dataclass

import torch
from torch import Tensor

LUMINANCE = {"black": 0.0, "dark gray": 0.25, "gray": 0.5, "light gray": 0.75, "white": 1.0}


@dataclass
class SquarePainter:
    """pull 0 paints the background that was asked for, pull 1 always middle gray."""

    pull: float

    def sample(self, prompts: list[str], seeds: list[int], **settings: object) -> Tensor:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            name = prompt.partition(" on a ")[2].removesuffix(" background")
            drawn = float(torch.randint(5, (1,), generator=generator)) / 4
            background = LUMINANCE.get(name, drawn)
            image = torch.full((3, 64, 64), self.pull * 0.5 + (1 - self.pull) * background)
            image[:, 20:44, 20:44] = torch.rand(3, 1, 1, generator=generator)
            images.append(image)
        return torch.stack(images)


def load_square_painter(checkpoint: str) -> SquarePainter:
    """Reads the pull off the checkpoint's name, such as `pull=0.9`; loads in any process."""
    return SquarePainter(float(checkpoint.removeprefix("pull=")))
