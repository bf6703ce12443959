"""Bytes of an image file -> an upright 8-bit RGB image, or the reason why there is none.

The bytes decide what an image is, not its name; EPS and other formats that run programs or that
nobody trains on are not opened.

What becomes of the unusual ones:

- EXIF orientation is applied: width and height are those that a viewer shows.
- Alpha and transparent palettes are composited on white.
- 16-bit gray is divided by 256; CMYK, YCbCr and palettes are converted; colour profiles are not
  applied. 32-bit integers and floats have no agreed white and are refused.
- Of an animation the first frame is taken.
- An image of more pixels than a limit is refused before it is decoded (decompression bomb).
"""

import functools
import json
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's own bound: a quarter of a gigabyte of RGB."""
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
"""Rec. 709 weights, applied to the encoded values."""

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


def decode(image_bytes: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Returns the upright RGB image in `image_bytes`; raises BadImage with the reason."""
    if not image_bytes:
        raise BadImage("zero bytes")
    if Image.MAX_IMAGE_PIXELS is not None and max_image_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        return _to_rgb(_open(image_bytes, max_image_pixels))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        reason = f"decompression bomb: far above max_image_pixels={max_image_pixels}"
        raise BadImage(reason) from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes.
        raise BadImage(f"truncated or damaged: {error or type(error).__name__}") from None


def decode_caption(caption_bytes: bytes) -> str:
    """Returns the caption without surrounding space; raises BadImage if there is none."""
    try:
        caption = caption_bytes.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadImage("the caption is not UTF-8") from None
    if not caption:
        raise BadImage("empty caption")
    return caption


def json_caption(json_bytes: bytes) -> bytes:
    """Returns the "caption" of a .json member, UTF-8; raises BadImage if there is none."""
    try:
        caption = json.loads(json_bytes)["caption"]
    except (ValueError, RecursionError):
        raise BadImage("no caption: the .json is damaged") from None
    except (KeyError, TypeError):
        raise BadImage('no caption: the .json has no "caption"') from None
    if not isinstance(caption, str):
        raise BadImage('no caption: "caption" in the .json is no text')
    try:
        return caption.encode()
    except UnicodeEncodeError:  # \ud800 stands in JSON for half a character.
        raise BadImage("the caption is not UTF-8") from None


def luminance(image: Image.Image) -> float:
    """Returns the mean luminance of an RGB image, 0 black to 1 white."""
    channel_means = np.asarray(image).mean(axis=(0, 1), dtype=np.float64)
    return float(channel_means @ LUMINANCE) / 255


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns the formats that are opened, as far as this Pillow has them."""
    Image.init()
    wanted = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")
    return tuple(name for name in wanted if name in Image.OPEN)


def _open(image_bytes: bytes, max_image_pixels: int) -> ImageFile.ImageFile:
    image = Image.open(BytesIO(image_bytes), formats=_formats())
    width, height = image.size
    if width * height > max_image_pixels:
        raise BadImage(
            f"decompression bomb: {width} x {height} px, above max_image_pixels={max_image_pixels}"
        )
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit pixels (mode {image.mode}) have no agreed white")
    if image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(gray.astype(np.uint8))
    if image.mode != "RGB" or "transparency" in image.info:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Damaged EXIF in an intact image: it is shown as it is stored.
        return 1
