"""Luminance of images and of their borders, the measure of the black point.

    Y = 0.299 R + 0.587 G + 0.114 B

on the stored (gamma-encoded) values, Rec. 601: what `PIL.Image.convert("L")` computes, so that 0 is
black, 1 is white and a gray keeps its value. The border is the outer two rows and columns: in the
embedded data it shows the background alone, so its luminance is known from the caption.
"""

import torch
from jaxtyping import Float
from torch import Tensor

REC_601 = (0.299, 0.587, 0.114)
BORDER_PX = 2


def luminance(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n h w"]:
    """Returns the luminance of every pixel in [0, 1], for images in [0, 1]."""
    weights = torch.tensor(REC_601, dtype=images.dtype, device=images.device)
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
