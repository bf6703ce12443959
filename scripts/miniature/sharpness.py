"""Sharpness of an image, a score without a model that does not saturate."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from blackpoint.data.images.luminance import WEIGHTS


class Sharpness:
    """Logarithm of the mean absolute Laplacian of the luminance."""

    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str], previews: Tensor | None) -> Tensor:
        """Returns the score of images (N, 3, H, W) in [0, 1], (N,)."""
        gray = (images * images.new_tensor(WEIGHTS)[:, None, None]).sum(dim=1, keepdim=True)
        kernel = images.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
        return F.conv2d(gray, kernel).abs().mean(dim=(1, 2, 3)).clamp(min=1e-6).log()
