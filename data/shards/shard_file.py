"""Writing shards: GNU tars whose bytes depend on nothing but their samples.

A member is a header of 512 bytes (1,024 and the padded name more if the name is longer than 100
bytes) and its content padded to 512; two empty blocks end the tar, padded to 10,240 bytes.
"""

import contextlib
import os
import tarfile
from pathlib import Path

from blackpoint.data.record import Span
from blackpoint.data.shards.shard_digest import ContentDigest, ShardContent, file_stamp

_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME = 100  # bytes of a name that a plain header holds


class ShardFile:
    """One shard that is being written; `offset` is its size so far, in bytes."""

    def __init__(self, path: Path) -> None:
        self.offset = 0
        self._file = path.open("wb")
        self._digest = ContentDigest()

    def write(self, key: str, members: dict[str, bytes]) -> dict[str, Span]:
        """Appends one sample, its image or latents first; returns the places of its members."""
        spans = dict[str, Span]()
        for extension, content in members.items():
            header = _header(f"{key}.{extension}", len(content))
            self._write(header)
            self._write(content, is_image=not spans)
            self._write(bytes(-len(content) % _BLOCK))
            spans[extension] = Span(self.offset + len(header), len(content))
            self.offset += len(header) + _padded(len(content))
        return spans

    @property
    def num_bytes(self) -> int:
        """Size of the tar if it ends here."""
        end = self.offset + 2 * _BLOCK
        return end + -end % tarfile.RECORDSIZE

    def close(self) -> ShardContent:
        """Ends the tar, flushes it to the disk and returns its contents."""
        self._write(bytes(self.num_bytes - self.offset))
        self._file.flush()
        os.fsync(self._file.fileno())
        stamp = file_stamp(os.fstat(self._file.fileno()))
        self._file.close()
        return self._digest.content(stamp)

    def _write(self, content: bytes, is_image: bool = False) -> None:
        self._file.write(content)
        self._digest.update(content, is_image)

    def abandon(self) -> None:
        """Closes the file as it is, whatever can still be written."""
        with contextlib.suppress(OSError):
            self._file.close()


def shard_name(number: int) -> str:
    """Returns the name of the `number`-th shard, from 0."""
    return f"shard-{number:06d}.tar"


def is_full(num_samples: int, offset: int, max_samples: int, max_bytes: float) -> bool:
    """Tells whether the next sample begins a new shard."""
    return num_samples >= max_samples or offset >= max_bytes


def member_bytes(name: str, size: int) -> int:
    """Returns the bytes that a member of `size` bytes adds to a tar."""
    name_size = len(name.encode("utf-8", "surrogateescape"))
    long_name = _BLOCK + _padded(name_size + 1) if name_size > _MAX_NAME else 0
    return long_name + _BLOCK + _padded(size)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    # No time and no user of this machine: the same folder gives the same bytes.
    member.size, member.mtime, member.mode = size, 0, 0o444
    member.uname = member.gname = "bigdata"  # as webdataset's own writer
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return size + -size % _BLOCK
