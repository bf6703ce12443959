"""Luminance of images and of their borders, the measure of the black point.

As data/images/luminance.py defines it. The border is the outer two rows and columns: in the
embedded data it shows the background alone, so its luminance is known from the caption.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.images.luminance import WEIGHTS

BORDER_PX = 2


def luminance(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n h w"]:
    """Returns the luminance of every pixel in [0, 1], for images in [0, 1]."""
    weights = torch.tensor(WEIGHTS, dtype=images.dtype, device=images.device)
    return torch.einsum("nchw,c->nhw", images, weights)


def image_luminance(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Returns each image's mean luminance."""
    return luminance(images).mean(dim=(1, 2))


def border_luminance(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Returns the mean luminance of each image's outer two rows and columns."""
    values = luminance(images)
    inner = values[:, BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]
    num_border = values[0].numel() - inner[0].numel()
    return (values.sum(dim=(1, 2)) - inner.sum(dim=(1, 2))) / num_border
