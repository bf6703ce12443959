"""Bytes of a caption -> its text; and the old names of what decodes images (data/images)."""

import json

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
