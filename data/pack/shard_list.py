"""The samples of one shard, as a file: one JSON line per sample, so that nothing is held in memory.

The cuts between shards follow from names and sizes alone, in the order of the entries: shard k is
full when it has `max_samples` or is of `max_bytes`. A sample that turns out bad later makes its
shard smaller and moves no other sample, so shards can be written in any order, by any process,
and a restarted run cuts as the first did.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.caption_text import Captions, caption_members
from blackpoint.data.files.errors import disk_writes
from blackpoint.data.pack.caption_parts import relative_to
from blackpoint.data.pack.image_folder import CaptionedFile
from blackpoint.data.shards.shard_file import is_full, member_bytes


class ShardList(NamedTuple):
    """One shard to be written; the digest covers names, captions, sizes and times of change."""

    number: int
    path: Path
    digest: str
    num_entries: int


class ListedFile(NamedTuple):
    """One image of a shard; `path` is relative to the source folder, absolute elsewhere."""

    key: str
    name: str
    path: str
    captions: Captions
    size: int
    changed_ns: int
    extra: tuple[int, int] | None
    """Size and time of change of the .json beside it."""
    row: int | None = None
    """Of an image inside the Parquet file `path`."""


def shard_lists(
    entries: Iterable[CaptionedFile | BadSample],
    source: Path,
    folder: Path,
    max_samples: int,
    max_bytes: float,
) -> Iterator[ShardList]:
    """Cuts the entries into shards; each list is a file in `folder`, for the reader to remove."""
    writer: _ListWriter | None = None
    number, num_samples, num_bytes = 0, 0, 0
    for entry in entries:
        listed = entry if isinstance(entry, BadSample) else _listed(entry, source)
        if isinstance(listed, ListedFile):
            if writer and is_full(num_samples, num_bytes, max_samples, max_bytes):
                yield writer.close()
                writer, number, num_samples, num_bytes = None, number + 1, 0, 0
            num_samples += 1
            num_bytes += _sample_bytes(listed)
        writer = writer or _ListWriter(folder, number)
        writer.write(listed)
    if writer:
        yield writer.close()


def read_list(path: Path) -> Iterator[ListedFile | BadSample]:
    """Yields the entries of a list, in order."""
    with path.open(encoding="ascii") as file:
        for line in file:
            values = json.loads(line)
            if len(values) == 2:
                yield BadSample(*values)
                continue
            captions = (values[3],) if isinstance(values[3], str) else tuple(values[3])
            yield ListedFile(*values)._replace(captions=captions)


class _ListWriter:
    def __init__(self, folder: Path, number: int) -> None:
        self.path, self.number, self.num_entries = folder / f"{number:06d}.list", number, 0
        self._digest = blake2b(digest_size=16)
        with disk_writes():
            self._file = self.path.open("wb")

    def write(self, entry: ListedFile | BadSample) -> None:
        # ASCII: file names that are no UTF-8 come back as they were.
        line = json.dumps(_line(entry)).encode("ascii") + b"\n"
        self._digest.update(line)
        self.num_entries += 1
        with disk_writes():
            self._file.write(line)

    def close(self) -> ShardList:
        with disk_writes():
            self._file.close()
        return ShardList(self.number, self.path, self._digest.hexdigest(), self.num_entries)


def _line(entry: ListedFile | BadSample) -> list[Any]:
    """Returns the entry of a list: one caption as a text, and no row where there is none."""
    if isinstance(entry, BadSample):
        return list(entry)
    key, name, path, captions, *others, row = entry
    shown = captions[0] if len(captions) == 1 else captions
    return [key, name, path, shown, *others, *([] if row is None else [row])]


def _listed(entry: CaptionedFile, source: Path) -> ListedFile:
    path = str(entry.path)
    size, changed_ns = _status(path) or (0, 0)  # no file any more: its reader says so
    extra = None
    if entry.row is not None:
        size = entry.num_bytes
    else:
        extra = _status(os.path.splitext(path)[0] + ".json")
    shown = relative_to(entry.path, source)
    return ListedFile(
        entry.key, entry.name, shown, entry.captions, size, changed_ns, extra, entry.row
    )


def _sample_bytes(listed: ListedFile) -> int:
    suffix = os.path.splitext(listed.path)[1]
    total = member_bytes(listed.key + suffix, listed.size)
    extra = listed.extra[0] if listed.extra else 0
    for name, content in caption_members(listed.captions).items():
        total += member_bytes(f"{listed.key}.{name}", len(content) + extra * (name == "json"))
    if extra and len(listed.captions) == 1:
        total += member_bytes(f"{listed.key}.json", extra)
    return total


def _status(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
