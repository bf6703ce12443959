"""One shard of a pack: from its list to a tar and a part file (data/work/part.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blackpoint.data.bad_samples import BadSample, too_many
from blackpoint.data.caption_text import caption_members
from blackpoint.data.files.errors import disk_writes
from blackpoint.data.images.decode import BadImage, decode, image_suffix
from blackpoint.data.images.luminance import luminance
from blackpoint.data.images.picture_size import size_before_storing
from blackpoint.data.images.pictures import MAX_IMAGE_BYTES, read_source_file
from blackpoint.data.pack.embedded_images import EmbeddedImages
from blackpoint.data.pack.shard_list import ListedFile, ShardList, read_list
from blackpoint.data.record import JSON, TEXT, ShardRecords
from blackpoint.data.shards.shard_file import ShardFile, shard_name
from blackpoint.data.work.part import Part, write_part

NUM_BAD_BEFORE_STOP = 100
REPORT_EVERY = 16


@dataclass(frozen=True)
class ShardRules:
    """Settings that all shards of a pack share."""

    source: Path
    shards: Path
    """Folder of the finished tars."""
    parts: Path
    """Folder of the part files."""
    working: Path
    """Folder of half-written files."""
    max_image_pixels: int
    max_bad_share: float
    num_images: int
    image_column: str = "image"
    """Of Parquet files with images inside."""


def pack_shard(rules: ShardRules, listed: ShardList, advance: Callable[[int], None]) -> Part:
    """Writes one shard and its part file, removes its list, and returns its result.

    A shard without a usable sample has a part file and no tar. Raises WriteFailed.
    """
    records, bad = ShardRecords(), list[BadSample]()
    name = shard_name(listed.number)
    with disk_writes():
        shard = ShardFile(rules.working / name)
    num_entries, is_whole = 0, True
    try:
        with EmbeddedImages(rules.image_column) as embedded:
            for entry in read_list(listed.path):
                _pack_one(entry, shard, records, rules, embedded, bad)
                num_entries += 1
                if num_entries % REPORT_EVERY == 0:
                    advance(REPORT_EVERY)
                if is_hopeless(len(bad), rules):
                    is_whole = False
                    break
        advance(num_entries % REPORT_EVERY)
        with disk_writes():
            content = shard.close()
    finally:
        shard.abandon()
    num_bytes = shard.num_bytes if len(records) else 0
    counts = num_bytes, len(records), num_entries
    part = Part(listed.number, listed.digest, *counts, bad, content, is_whole)
    if is_whole:
        with disk_writes():
            if len(records):
                (rules.working / name).replace(rules.shards / name)
            write_part(part, records, rules.parts, rules.working)
            listed.path.unlink()
    return part


def is_hopeless(num_bad: int, rules: ShardRules) -> bool:
    """Tells that a pack can stop: a folder that is bad throughout is not read to its end."""
    # What is bad may come on top of the images: a table's rows that name no file.
    return num_bad >= NUM_BAD_BEFORE_STOP and too_many(
        num_bad, rules.num_images + num_bad, rules.max_bad_share
    )


def _pack_one(
    entry: ListedFile | BadSample,
    shard: ShardFile,
    records: ShardRecords,
    rules: ShardRules,
    embedded: EmbeddedImages,
    bad: list[BadSample],
) -> None:
    if isinstance(entry, BadSample):
        bad.append(entry)
        return
    path = rules.source / entry.path
    try:
        extra = None
        if entry.row is not None:
            image_bytes = embedded.read(path, entry.row)
        else:
            image_bytes = read_source_file(path, MAX_IMAGE_BYTES)
        picture = decode(image_bytes, rules.max_image_pixels)
        if entry.extra is not None:
            extra = read_source_file(path.with_suffix(".json"), MAX_IMAGE_BYTES)
        suffix = path.suffix[1:].lower() if entry.row is None else image_suffix(image_bytes)
        members = {suffix: image_bytes} | caption_members(entry.captions, extra)
    except BadImage as reason:
        bad.append(BadSample(entry.name, str(reason)))
        return
    with disk_writes():
        image, caption, *_ = shard.write(entry.key, members).values()
    form = TEXT if len(entry.captions) == 1 else JSON
    original = size_before_storing(extra or b"", *picture.size)
    records.add(entry.key, image, caption, *picture.size, luminance(picture), form, original)
