"""The part file of a shard: the mark that it is finished, and its records for the index.

It holds the digest of what the shard was made from, the size of its tar, the samples left out and
the records for the index. The tar is moved into place first and the part file last, so a shard
whose part file is there is whole, and is not written again as long as the digest is the same.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.images.luminance import REC_601, REC_709
from blackpoint.data.record import RECORD, ShardRecords
from blackpoint.data.shards.shard_digest import (
    ShardContent,
    file_digest,
    file_stamp,
    settled,
    shard_content,
)
from blackpoint.data.shards.shard_file import shard_name


@dataclass(frozen=True)
class Part:
    """Result of one shard."""

    number: int
    digest: str
    num_bytes: int
    num_samples: int
    num_entries: int
    bad: list[BadSample]
    content: ShardContent = ShardContent()
    """Of the tar; without digests in a part from before there were any."""
    is_whole: bool = True
    """False where so much was bad that the rest was not read."""
    luminance_weights: str = REC_601
    """Of its records; parts from before they were named have those of Rec. 709."""


def part_path(parts: Path, number: int) -> Path:
    """Returns where the part file of a shard is."""
    return parts / f"{number:06d}.part"


def finished_part(parts: Path, shards: Path, number: int, digest: str) -> Part | None:
    """Returns the part of a shard that is finished and of this very digest; else None."""
    try:
        part, _ = read_part(part_path(parts, number))
        is_same = not part.num_bytes or _holds(shards / shard_name(number), part)
    except (OSError, ValueError, TypeError):
        return None
    return part if part.digest == digest and is_same else None


def read_part(path: Path) -> tuple[Part, ShardRecords]:
    """Reads a part file; raises OSError, ValueError or TypeError if it is not a whole one."""
    with path.open("rb") as file:
        values = json.loads(file.readline())
        values["bad"] = [BadSample(*sample) for sample in values["bad"]]
        values["content"] = ShardContent(*values.get("content", ()))
        values.setdefault("luminance_weights", REC_709)
        num_key_bytes = values.pop("num_key_bytes")
        num_original_bytes = values.pop("num_original_bytes", 0)
        part = Part(**values)
        sizes = (part.num_samples * RECORD.itemsize, num_key_bytes, num_original_bytes)
        records, keys, originals = map(file.read, sizes)
    if tuple(map(len, (records, keys, originals))) != sizes:
        raise ValueError(f"{path}: is cut short")
    return part, ShardRecords(records, keys, part.luminance_weights, originals)


def shard_content_of(part: Part, shard: Path, records: ShardRecords) -> ShardContent:
    """Returns the contents of a finished shard, read again where the part lacks them."""
    if not part.content.whole:
        return shard_content(shard, records.records)
    return part.content._replace(stamp=settled(part.content.stamp))


def _holds(shard: Path, part: Part) -> bool:
    """Tells whether a tar is the one that was written: by its bytes where its time has changed."""
    status = shard.stat()
    if status.st_size != part.num_bytes or not part.content.whole:
        return status.st_size == part.num_bytes
    return part.content.stamp == file_stamp(status) or part.content.whole == file_digest(shard)


def write_part(part: Part, records: ShardRecords, parts: Path, working: Path) -> None:
    """Writes a part file in `working` and moves it, whole, into `parts`."""
    path = part_path(working, part.number)
    sizes = {"num_key_bytes": len(records.keys)}
    if records.originals:
        sizes["num_original_bytes"] = len(records.originals)
    header = json.dumps(asdict(part) | sizes).encode("ascii")
    content = (records.records.tobytes(), records.keys, records.originals)
    path.write_bytes(header + b"\n" + b"".join(content))
    path.replace(part_path(parts, part.number))
