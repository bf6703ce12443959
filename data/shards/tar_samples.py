"""The samples of a tar, damaged or hostile as it may be: where each member's bytes are.

Nothing is unpacked and no name is ever used as a path. A damaged header does not cost the rest of
the shard: reading goes on at the next block that is a valid header, and what was skipped is named.
Three things are looked for that a plain reader of tars lets pass in silence:

- a size that is too large, so that one member swallows the next: a header inside its bytes
- zeros in the middle, which look like the end: a header after the end mark
- an end without end mark: the file was cut off there

Names follow WebDataset: the key is the path up to the first dot of its last part, the rest is the
extension, and a sample is a run of members of one key.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.record import MAX_KEY_BYTES, Span

BLOCK = 512
MAX_HEADER_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


@dataclass
class TarSample:
    """One run of members: {extension: span}, or the fault for which it can't be used."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)
    fault: str = ""
    member_faults: dict[str, str] = field(default_factory=dict)
    """Why members, by extension, can't be used."""


def split_name(name: str) -> tuple[str, str] | None:
    """Returns (key, lower-case extension) of a member's name, as WebDataset does; or None."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def tar_samples(shard: Path, bad: list[BadSample]) -> Iterator[TarSample]:
    """Yields each run of members with one key; a damaged stretch of the tar is named in `bad`."""
    sample: TarSample | None = None

    def damaged(reason: str) -> None:
        bad.append(BadSample(shard.name, f"damaged tar: {reason}"))

    try:
        with shard.open("rb") as file:
            for member, fault in _members(file, damaged):
                name = split_name(member.name)
                if name is None and "\0" in member.name:
                    bad.append(BadSample(f"{shard.name}:{member.name}", _key_fault("\0")))
                if member.isdir() or name is None or _is_hidden(member.name):
                    continue
                key, extension = name
                # A second image or caption of one key begins a second sample of that key.
                if sample and (key != sample.key or extension in sample.members):
                    yield sample
                    sample = None
                sample = sample or TarSample(key, fault=_key_fault(key))
                sample.members[extension] = Span(member.offset_data, member.size)
                fault = fault or _kind_fault(member, extension)
                if fault:
                    sample.member_faults[extension] = fault
    except OSError as error:
        bad.append(BadSample(shard.name, f"can't be read: {error.strerror or error}"))
    if sample:
        yield sample


def _members(
    file: BinaryIO, damaged: Callable[[str], None]
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yields (member, fault) from the first block to the last, past damaged parts."""
    length = file.seek(0, os.SEEK_END)
    start: int | None = 0
    while start is not None:
        here = _Position(start)
        yield from _until_damage(file, here, length)
        end = here.offset
        file.seek(min(end, length))  # a size may claim more than the system can seek to
        if not here.reason and file.read(BLOCK) == bytes(BLOCK):
            start = _find_header(file, end, length)
            reason = f"the end mark at byte {end} is not the end"
            if start is None:
                return
        else:
            start = here.resume if here.reason else _find_header(file, end + BLOCK, length)
            compressed = end == 0 and _is_compressed(file)
            reason = here.reason or f"no header and no end mark at byte {end}"
            reason = "compressed; shards are plain tars, unpack it" if compressed else reason
        damaged(f"{reason}; {_what_is_lost(end, start, length)}")


@dataclass
class _Position:
    """How far a tar has been read, and why no further."""

    offset: int
    reason: str = ""
    resume: int | None = None
    """Where a header was found behind the damage: reading goes on there."""


def _until_damage(
    file: BinaryIO, here: _Position, length: int
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    file.seek(here.offset)
    try:
        capped = _Capped(file, length)
        tar = tarfile.TarFile(fileobj=capped, encoding="utf-8")  # type: ignore[arg-type]
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # It would keep them all.
            if tar.offset <= here.offset or member.size < 0:
                raise tarfile.ReadError(f"a member of {member.size} bytes")
            inner = None
            if member.isreg() and not member.name.endswith(".tar"):
                inner = _find_header(file, member.offset_data, min(tar.offset, length))
            yield member, "" if inner is None else "wrong size in the tar's header"
            if inner is not None:
                here.offset, here.resume = member.offset_data, inner
                raise tarfile.ReadError(f"{member.size} bytes claimed, the next header is inside")
            here.offset = tar.offset
    except Exception as error:  # tarfile raises nearly anything on damaged headers.
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
            raise
        reason = str(error) or type(error).__name__
        here.reason = f"{reason} at byte {here.offset}"
        if here.resume is None:
            # Not from the first header after the damage: a chain of extension headers is one loss.
            read_to = file.tell() // BLOCK * BLOCK
            here.resume = _find_header(file, max(here.offset + BLOCK, read_to), length)


def _find_header(file: BinaryIO, start: int, stop: int) -> int | None:
    """Returns the first byte of the first valid header in [start, stop), whole blocks only."""
    while start < stop:
        file.seek(start)
        chunk = file.read(min(CHUNK_BYTES, stop - start))
        if not chunk:
            return None
        magic = chunk.find(b"ustar")
        while magic >= 0:
            first = magic - 257  # where the magic stands in a header
            if first % BLOCK == 0 and first >= 0 and _is_header(chunk[first : first + BLOCK]):
                return start + first
            magic = chunk.find(b"ustar", magic + 1)
        start += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _is_compressed(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _what_is_lost(end: int, start: int | None, length: int) -> str:
    if end >= length:
        return "the file ends there"
    if start is None:
        return f"nothing readable in the last {length - end} bytes"
    return f"read on at byte {start}"


def _is_hidden(name: str) -> bool:
    return os.path.basename(name).startswith(".")


def _key_fault(key: str) -> str:
    if key.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", key):
        return "the name leads out of the folder"
    if "\0" in key:
        return "the name holds a NUL byte"
    num_bytes = len(key.encode("utf-8", "backslashreplace"))
    return f"the name has {num_bytes} bytes" if num_bytes > MAX_KEY_BYTES else ""


def _kind_fault(member: tarfile.TarInfo, extension: str) -> str:
    if member.isreg() and not member.issparse():
        return ""
    kinds = {
        "a symbolic link": member.issym(),
        "a hard link": member.islnk(),
        "a device": member.isdev(),  # and FIFOs
        "a sparse file": member.issparse(),
    }
    kind = next((kind for kind, applies in kinds.items() if applies), "of an unknown kind")
    return f"no regular file: .{extension} is {kind}"


class _Capped:
    """A file for tarfile, which believes a header's word on how long its extension is."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file, self.length = file, length
        self.name, self.mode = "", "rb"

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int) -> int:
        if not 0 <= offset <= self.length:
            raise tarfile.ReadError("unexpected end of data")
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()
