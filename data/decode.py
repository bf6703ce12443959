"""Bytes of a caption -> its text; and the old names of what decodes images (data/images)."""

from data.images.decode import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from data.images.decode import MAX_IMAGE_PIXELS as MAX_IMAGE_PIXELS
from data.images.decode import BadImage as BadImage
from data.images.decode import decode as decode
from data.images.luminance import luminance as luminance


def decode_caption(caption_bytes: bytes) -> str:
    """Returns the caption without surrounding space; raises BadImage if there is none."""
    try:
        caption = caption_bytes.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadImage("the caption is not UTF-8") from None
    if not caption:
        raise BadImage("empty caption")
    return caption
