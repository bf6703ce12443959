"""The luminance of a whole picture."""

import numpy as np
from PIL import Image

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
"""Rec. 709 weights, applied to the encoded values."""


def luminance(image: Image.Image) -> float:
    """Returns the mean luminance of an RGB image, 0 black to 1 white."""
    channel_means = np.asarray(image).mean(axis=(0, 1), dtype=np.float64)
    return float(channel_means @ LUMINANCE) / 255
