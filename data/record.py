"""One record of the index: where a sample is in its shard, how large and how bright.

A record has 52 bytes, whatever the sample. `caption_form` tells what the caption's bytes are: TEXT,
a member that is the caption, or JSON, a .json member with a field that is the caption or a list of
captions (data/shards/sample_keys.py).
"""

from typing import NamedTuple

import numpy as np

from blackpoint.data.images.luminance import REC_601

TEXT, JSON = 0, 1
MAX_KEY_BYTES = 0xFFFF
RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("image_size", "<u4"),  # bytes
        ("image_offset", "<u8"),  # bytes from the start of the tar
        ("caption_offset", "<u8"),
        ("caption_size", "<u4"),
        ("width", "<u4"),  # pixels, upright
        ("height", "<u4"),
        ("luminance", "<f4"),  # mean, 0 to 1: data/images/luminance.py
        ("key_offset", "<u8"),
        ("key_size", "<u2"),
        ("caption_form", "<u2"),
    ]
)
ORIGINAL = np.dtype("<u4")
UNKNOWN = (0, 0)


class Span(NamedTuple):
    """Bytes [offset, offset + size) of a shard."""

    offset: int
    size: int


class ShardRecords:
    """The records, keys and original sizes of one shard, as they are collected.

    Offsets of keys count from the shard's first key; IndexWriter.append moves them.
    """

    def __init__(
        self,
        records: bytes = b"",
        keys: bytes = b"",
        luminance_weights: str = REC_601,
        originals: bytes = b"",
    ) -> None:
        self.luminance_weights = luminance_weights
        self._records = bytearray(records)
        self._keys = bytearray(keys)
        self._originals = bytearray(originals)

    def __len__(self) -> int:
        return len(self._records) // RECORD.itemsize

    def add(
        self,
        key: str,
        image: Span,
        caption: Span,
        width: int,
        height: int,
        luminance: float,
        caption_form: int = TEXT,
        original: tuple[int, int] = UNKNOWN,
    ) -> None:
        """Appends a sample; width and height in pixels, luminance 0 to 1.

        `original` are the width and height before it was stored, where they are known.
        """
        key_bytes = key.encode("utf-8", "backslashreplace")
        places = (0, image.size, image.offset, caption.offset, caption.size)
        measures = (width, height, luminance)
        row = (*places, *measures, len(self._keys), len(key_bytes), caption_form)
        self._records += np.array(row, RECORD).tobytes()
        self._keys += key_bytes
        self._originals += np.array(original, ORIGINAL).tobytes()

    @property
    def records(self) -> np.ndarray:
        """RECORD (number of samples,), a copy."""
        return np.frombuffer(bytes(self._records), RECORD).copy()

    @property
    def keys(self) -> bytes:
        """The keys, UTF-8, one after the other."""
        return bytes(self._keys)

    @property
    def originals(self) -> bytes:
        """ORIGINAL (number of samples, 2), widths and heights; empty where none is known."""
        return bytes(self._originals) if any(self._originals) else b""
