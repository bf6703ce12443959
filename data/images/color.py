"""Colour profiles (ICC): pixel values as an image stores them -> sRGB.

Relative colorimetric with black point compensation: white stays white, and the darkest that a
profile can describe becomes black. Colours beyond sRGB are clipped. A profile that leaves
sRGB values within SRGB_LEVELS where they are counts as sRGB, of which there are many versions that
differ by rounding: those pixels are not touched.

Not read: gamma and chromaticities of a PNG without profile, and "Adobe RGB" that stands in EXIF
alone.
"""

import functools
import itertools
import logging
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from blackpoint.data.files.notes import first

SRGB_LEVELS = 2
MIN_CONTRAST_LEVELS = 128
"""Between white and black, both converted; what has less is broken."""
NUM_KEPT = 16
LAB = "LAB"
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")

log = logging.getLogger(__name__)


def to_srgb(image: Image.Image, stored_mode: str, profile: bytes | None) -> Image.Image:
    """Returns an RGB image in sRGB.

    `image` is RGB, converted from `stored_mode` by Pillow's rules, or CMYK or LAB as it is stored.
    A profile that is broken, or of another kind of pixels, is ignored with a note.
    """
    if image.mode == LAB:
        return _lab_transform().apply(image)
    if profile:
        try:
            return _converted(image, stored_mode, profile)
        except Exception as error:  # lcms refuses broken profiles in many ways.
            if first("images whose colour profile can't be used"):
                log.warning(
                    "note: a colour profile is ignored (%s); the image counts as sRGB", error
                )
    return image.convert("RGB")


def _converted(image: Image.Image, stored_mode: str, profile: bytes) -> Image.Image:
    mode, transform = _transform(profile)
    is_gray, is_cmyk = stored_mode in _GRAY_MODES, image.mode == "CMYK"
    # Gray in an RGB profile is meant as R = G = B; other mixtures mean nothing.
    if (mode == "CMYK") != is_cmyk or (mode == "L" and not is_gray):
        raise ValueError(f"made for {mode} pixels, and these are {stored_mode}")
    if transform is None:
        return image
    return transform.apply(image.getchannel(0) if mode == "L" else image)


@functools.lru_cache(NUM_KEPT)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Returns the mode that a profile is made for, and None in place of a transform for sRGB."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space
    if space not in _MODES:
        raise ValueError(f"made for {space.strip() or 'unknown'} pixels")
    mode = _MODES[space]
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    probe = _probe(mode)
    converted = np.asarray(transform.apply(probe)).astype(int)
    white, black = converted[0, -1], converted[0, 0]
    if mode == "CMYK":
        white, black = black, white
    if white.min() - black.max() < MIN_CONTRAST_LEVELS:
        raise ValueError(f"shows black as {black.tolist()} and white as {white.tolist()}")
    if mode != "CMYK" and abs(converted - np.asarray(probe.convert("RGB"))).max() <= SRGB_LEVELS:
        return mode, None
    return mode, transform


def _probe(mode: str) -> Image.Image:
    """Returns one row of pixels from all channels 0 to all channels 255."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 4 if mode == "CMYK" else 16)
    colors = list(itertools.product(levels, repeat=len(mode)))
    if mode == "RGB":
        colors[1:1] = [(level,) * 3 for level in range(256)]
    return Image.fromarray(np.array(colors).round().astype(np.uint8)[None], mode)


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, LAB, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
