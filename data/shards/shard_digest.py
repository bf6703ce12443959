"""Digests of a shard's content, wherever it lies and whenever it was written.

    whole   BLAKE2b of all bytes
    text    BLAKE2b of all bytes but those of the samples' images (or latents): of tar headers,
            captions and all other members. It costs a read of a few kB per sample.

A stamp is a fast first look, which costs no read: size and time of change of a file, or size and
version (ETag, Last-Modified) of what a server has. A file that is written again keeps its stamp
only within the resolution of the file system's clock (up to 2 s), so none is kept of a file that
has changed so recently; or where its writer sets the time back, as `cp -p` and `rsync -t` do.
"""

import os
import tarfile
import time
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blackpoint.data.caption_text import CAPTION_FIELD

DIGEST_BYTES = 16
CHUNK_BYTES = 1 << 20
CLOCK_RESOLUTION_NS = 2 * 10**9
HEADER_BYTES = tarfile.BLOCKSIZE


class ShardContent(NamedTuple):
    """Identity of a shard's content; empty digests: not known."""

    num_bytes: int = 0
    whole: str = ""
    text: str = ""
    stamp: str = ""


class ContentDigest:
    """Both digests of a shard that comes in order, `num_bytes` of it so far."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._whole, self._text = new_digest(), new_digest()

    def update(self, content: bytes, is_image: bool = False) -> None:
        """Takes in the next bytes."""
        self.num_bytes += len(content)
        self._whole.update(content)
        if not is_image:
            self._text.update(content)

    def follow(self, file: int, stop: int, is_image: bool = False) -> None:
        """Takes in an open file up to byte `stop`, or its end."""
        while self.num_bytes < stop:
            content = os.pread(file, min(CHUNK_BYTES, stop - self.num_bytes), self.num_bytes)
            if not content:
                return
            self.update(content, is_image)

    def content(self, stamp: str = "") -> ShardContent:
        """Returns the digest of the bytes taken in."""
        digests = self._whole.hexdigest(), self._text.hexdigest()
        return ShardContent(self.num_bytes, *digests, stamp)


class ReadAlong:
    """Digests a shard that is read anyway, image by image: its bytes come from memory."""

    def __init__(self, file: int) -> None:
        status = os.fstat(file)
        self._file, self._num_bytes, self._digest = file, status.st_size, ContentDigest()
        self._stamp, self._is_readable = settled(file_stamp(status)), True

    def image(self, offset: int, size: int) -> None:
        """Goes on to the end of an image that lies behind the one before."""
        self._follow(offset)
        self._follow(offset + size, is_image=True)

    def content(self) -> ShardContent:
        """Goes on to the end of the shard; without digests if the disk can't read all of it."""
        self._follow(self._num_bytes)
        if not self._is_readable:
            return ShardContent(self._num_bytes)
        return self._digest.content(self._stamp)

    def _follow(self, stop: int, is_image: bool = False) -> None:
        try:
            if self._is_readable:
                self._digest.follow(self._file, stop, is_image)
        except OSError:
            self._is_readable = False


def new_digest() -> blake2b:
    """Returns an empty digest of the size that all of them have."""
    return blake2b(digest_size=DIGEST_BYTES)


def file_digest(path: Path) -> str:
    """Returns the digest of all bytes of a file."""
    digest = new_digest()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def shard_content(path: Path, rows: np.ndarray) -> ShardContent:
    """Reads a whole shard whose samples, RECORD, are `rows`."""
    with path.open("rb") as file:
        status, digest = os.fstat(file.fileno()), ContentDigest()
        stamp = settled(file_stamp(status))
        for start, size in _images(rows):
            digest.follow(file.fileno(), start)
            digest.follow(file.fileno(), start + size, is_image=True)
        digest.follow(file.fileno(), status.st_size)
    return digest.content(stamp)


def text_content(path: Path, rows: np.ndarray) -> ShardContent:
    """Reads all of a shard but the images of `rows`; `whole` is left empty."""
    with path.open("rb") as file:
        status, text = os.fstat(file.fileno()), new_digest()
        stamp, position = settled(file_stamp(status)), 0
        for start, size in [*_images(rows), (status.st_size, 0)]:
            while position < start:
                content = os.pread(file.fileno(), min(CHUNK_BYTES, start - position), position)
                if not content:
                    break
                text.update(content)
                position += len(content)
            position = start + size
    return ShardContent(status.st_size, "", text.hexdigest(), stamp)


def headers_fit(path: Path, rows: np.ndarray) -> bool:
    """Tells whether a header of the right size stands before each image and caption of `rows`."""
    with path.open("rb") as file:
        for member in ("image", "caption"):
            places = zip(rows[f"{member}_offset"], rows[f"{member}_size"], strict=True)
            for offset, size in places:
                block = os.pread(file.fileno(), HEADER_BYTES, int(offset) - HEADER_BYTES)
                try:
                    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                except (tarfile.TarError, ValueError):
                    return False
                if header.size != size:
                    return False
    return True


def samples_digest(rows: np.ndarray, field: str = CAPTION_FIELD) -> str:
    """Returns the digest of an index's records of a shard, but for their luminance.

    It decides which bytes are which sample, in which order and bucket; `rows` is RECORD (n,).
    `field` is that of a .json member which holds the captions.
    """
    rows = rows.copy()
    for name in ("shard", "key_offset", "luminance"):
        rows[name] = 0
    digest = new_digest()
    digest.update(rows.tobytes())
    if field != CAPTION_FIELD:
        digest.update(field.encode())
    return digest.hexdigest()


def file_stamp(status: os.stat_result) -> str:
    """Returns the stamp of a local file."""
    return f"{status.st_size}/{status.st_mtime_ns}"


def settled(stamp: str) -> str:
    """Returns a file's stamp, or "" if a change from now on could leave it as it is."""
    changed_ns = int(stamp.rpartition("/")[2] or 0)
    return stamp if changed_ns + CLOCK_RESOLUTION_NS < time.time_ns() else ""


def _images(rows: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(rows["image_offset"].tolist(), rows["image_size"].tolist(), strict=True))
