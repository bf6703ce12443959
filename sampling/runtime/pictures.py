"""Pictures from tensors, and back."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.images.pictures import open_picture


def eight_bit(images: Tensor) -> Tensor:
    """Rounds values in [0, 1] to a picture file's uint8; RunFailed for what is not finite."""
    if not torch.isfinite(images).all():
        raise RunFailed(
            "the model generated non-finite pixels; sample with dtype=float32, and if it is that, "
            "fetch the checkpoint and its LoRA files again: their values are damaged"
        )
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_picture(image: Tensor) -> Image.Image:
    """Turns (3, H, W) in [0, 1] into an 8-bit picture, rounding to nearest."""
    return Image.fromarray(eight_bit(image).permute(1, 2, 0).cpu().numpy())


def write_png(path: Path, picture: Image.Image) -> None:
    """Writes a picture as PNG; the file is whole or absent."""
    content = BytesIO()
    picture.save(content, "PNG")
    write_whole(path, content.getvalue())


def read_picture(file: Path) -> Tensor:
    """Reads a picture file as (3, H, W) float32 in [0, 1], decoded as training images are.

    The inverse of `to_picture`. Raises BadImage.
    """
    pixels = np.asarray(open_picture(file), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)
