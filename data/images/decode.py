"""Bytes of an image file -> an upright 8-bit RGB image, or the reason why there is none.

The bytes decide what an image is, not its name; EPS and other formats that run programs or that
nobody trains on are not opened.

What becomes of the unusual ones:

- EXIF orientation is applied: width and height are those that a viewer shows.
- Where an image has a colour profile, its colours become those of sRGB (data/images/color.py).
- Alpha and transparent palettes are composited on white.
- 16-bit gray is divided by 256; CMYK, YCbCr and palettes are converted. 32-bit integers and floats
  have no agreed white and are refused.
- Of an animation the first frame is taken.
- An image of more pixels than a limit is refused before it is decoded (decompression bomb).

Every picture of a user is read by this, so that a reference means what a training image means.
Caches and runs record the version of the decoder that they began with, and go on with it:

    1   pixel values as they are stored, whatever the colour profile; 16-bit gray is opaque
    2   sRGB
"""

import functools
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, __version__

from blackpoint.data.images.color import LAB, to_srgb

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's own bound: a quarter of a gigabyte of RGB."""
STORED_COLORS, DECODER_VERSION = 1, 2

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# decode() has its own pixel limit and names what it refuses; Pillow's warnings (bombs, torn EXIF)
# name nothing and would fill the log.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """The bytes can't be used as an image; the message is the reason."""


def decode(
    image_bytes: bytes,
    max_image_pixels: int | None = MAX_IMAGE_PIXELS,
    version: int = DECODER_VERSION,
) -> Image.Image:
    """Returns the upright RGB image in `image_bytes`; raises BadImage with the reason.

    max_image_pixels: None where no config has that key; then Pillow's limit holds, twice as high.
    """
    if not image_bytes:
        raise BadImage("zero bytes")
    limit = max_image_pixels or 2 * MAX_IMAGE_PIXELS
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit
    shown = f"max_image_pixels={limit}" if max_image_pixels else f"the limit of {limit} px"
    try:
        return _to_rgb(_open(image_bytes, limit, shown), version)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(_unreadable(image_bytes)) from None
    except Image.DecompressionBombError:
        raise BadImage(f"decompression bomb: far above {shown}") from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes.
        raise BadImage(f"truncated or damaged: {error or type(error).__name__}") from None


def image_suffix(image_bytes: bytes) -> str:
    """Returns the suffix of an image that can be decoded; raises BadImage for one without."""
    form = str(Image.open(BytesIO(image_bytes), formats=known_formats()).format)
    suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(form, form.lower())
    if suffix not in IMAGE_SUFFIXES:
        raise BadImage(f"{form} is none of {', '.join(IMAGE_SUFFIXES)}")
    return suffix


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Returns the formats that are opened, as far as this Pillow has them."""
    Image.init()
    wanted = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def _open(image_bytes: bytes, limit: int, shown: str) -> ImageFile.ImageFile:
    image = Image.open(BytesIO(image_bytes), formats=known_formats())
    width, height = image.size
    if width * height > limit:
        raise BadImage(f"decompression bomb: {width} x {height} px, above {shown}")
    image.load()
    return image


def _to_rgb(image: Image.Image, version: int) -> Image.Image:
    orientation, stored_mode = _orientation(image), image.mode
    profile = image.info.get("icc_profile") if version > STORED_COLORS else None
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit pixels (mode {image.mode}) have no agreed white")
    if image.mode.startswith("I;16"):
        image = _high_bytes(image, version)
    if image.mode != "RGB" or "transparency" in image.info:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            colors = to_srgb(image.convert("RGB"), stored_mode, profile)
            colors.putalpha(image.getchannel("A"))
            white = Image.new("RGBA", image.size, "white")
            image, profile = Image.alpha_composite(white, colors), None
        if image.mode not in ("CMYK", LAB):
            image = image.convert("RGB")
    image = to_srgb(image, stored_mode, profile)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image


def _high_bytes(image: Image.Image, version: int) -> Image.Image:
    gray = np.asarray(image).astype(np.uint16)
    high = Image.fromarray((gray >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int) and version > STORED_COLORS:
        high.putalpha(Image.fromarray(np.where(gray == clear, 0, 255).astype(np.uint8)))
    return high


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Damaged EXIF in an intact image: it is shown as it is stored.
        return 1


def _unreadable(image_bytes: bytes) -> str:
    if image_bytes[4:8] == b"ftyp" and image_bytes[8:12] in (b"avif", b"avis"):
        return f"AVIF that Pillow {__version__} can't read: install pillow>=11.3 from PyPI"
    return "not an image that Pillow can read"
