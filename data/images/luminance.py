"""Luminance: how bright a pixel or a picture is, 0 black to 1 white.

    Y' = 0.299 R' + 0.587 G' + 0.114 B'             (Rec. ITU-R BT.601-7, section 2.5.1)

of the values that an image file stores (gamma-encoded sRGB): strictly luma, in which a gray keeps
its value. These are the weights of `PIL.Image.convert("L")`, of OpenCV, of torchvision's grayscale
and of the Y of a JPEG, so that anyone measures the same on a picture; and what evaluations,
searches and trainings have recorded is measured by them, so that it stays comparable. Rec. 709
weighs sRGB's primaries in linear light, and is the closer one for colours near a gray; on grays,
which are what targets name, the two agree. Indexes and parts that do not name their weights were
written with those of Rec. 709.
"""

import numpy as np
from PIL import Image

REC_601, REC_709 = "rec_601", "rec_709"
WEIGHTS = (0.299, 0.587, 0.114)


def luminance(image: Image.Image) -> float:
    """Returns the mean luminance of an RGB image."""
    channel_means = np.asarray(image).mean(axis=(0, 1), dtype=np.float64)
    return float(channel_means @ np.array(WEIGHTS)) / 255
