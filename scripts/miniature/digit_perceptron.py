"""A second reader of digits: a dense network over the whole contrast map.

It has another architecture than the convolutional reader (scripts/miniature/digit_reader.py) and
was trained on digits that neither that reader nor the embedded model was trained on, so it can
judge what was searched for with the other one.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from blackpoint.scripts.miniature.digit_reader import SIDE_PX, contrast_map, load_weights

WIDTH, NUM_LAYERS = 512, 3


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
