"""The captions of one image: one text or several, in values of tables and in members of shards.

Several captions are a list of texts wherever a format has lists: in JSON and in Parquet. Where it
has none, in a .txt, a .caption or a CSV, a text is one caption, unless its user says that every
line is one. In a shard one caption is a .txt member; several are the "caption" of a .json:

    {"caption": ["a cat", "a cat on a mat"]}

`caption_number` (data/transform.py) draws which of several captions an epoch takes.
"""

import json
from typing import Any

from blackpoint.data.images.decode import BadImage

CAPTION_FIELD = "caption"
Captions = tuple[str, ...]
"""One caption or more, none of them empty."""


def decode_caption(caption_bytes: bytes) -> str:
    """Returns the caption without surrounding space; raises BadImage if there is none."""
    try:
        caption = caption_bytes.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadImage("the caption is not UTF-8") from None
    if not caption:
        raise BadImage("empty caption")
    return caption


def checked_captions(value: Any, name: str, lines: bool = False) -> Captions:
    """Returns the captions in a text or a list of texts, stripped; raises BadImage.

    None and empty texts in a list are passed over; `lines` says that each line is a caption. `name`
    is the column or field, for the reason.
    """
    several = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in several):
        raise BadImage(f"no caption: {name} is no text or list of texts")
    texts = [line for text in several if text for line in (text.split("\n") if lines else [text])]
    captions = []
    for text in texts if len(texts) == 1 else filter(str.strip, texts):
        try:
            captions.append(decode_caption(text.encode("utf-8", "surrogateescape")))
        except UnicodeEncodeError:  # \ud800 stands in JSON for half a character.
            raise BadImage("the caption is not UTF-8") from None
    if not captions:
        raise BadImage("empty caption")
    return tuple(captions)


def text_captions(content: bytes, lines: bool = False) -> Captions:
    """Returns the caption, or the captions, in a text file; raises BadImage."""
    text = decode_caption(content)
    return checked_captions(text, "the text", lines) if lines else (text,)


def json_captions(content: bytes, field: str = CAPTION_FIELD, lines: bool = False) -> Captions:
    """Returns the captions that are `field` of a .json file or member; raises BadImage."""
    try:
        value = json.loads(content)[field]
    except (ValueError, RecursionError):
        raise BadImage("no caption: the .json is damaged") from None
    except (KeyError, TypeError):
        raise BadImage(f'no caption: the .json has no "{field}"') from None
    return checked_captions(value, f'"{field}" in the .json', lines)


def caption_members(captions: Captions, extra: bytes | None = None) -> dict[str, bytes]:
    """Returns the members of a shard that hold the captions, that of the index first.

    `extra` is a .json that comes along: as it is beside one caption; several become its "caption".
    Raises BadImage where it is no object that could take them.
    """
    if len(captions) == 1:
        return {"txt": captions[0].encode()} | ({} if extra is None else {"json": extra})
    try:
        values = {} if extra is None else json.loads(extra)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadImage("the .json beside it is no JSON object, which several captions go into")
    values[CAPTION_FIELD] = captions
    return {"json": json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace")}
