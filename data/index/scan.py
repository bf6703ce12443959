"""One shard, read once: its records for the index, bad samples, and facts that show duplicates.

A sample is an image and its caption, or captions, of one key, one after the other in the tar;
data/shards/sample_keys.py says which members they are. Every image is decoded. Keys are unique
within a shard: of several usable samples the first is kept and the others are named. Keys that
return in another shard are kept: many writers number anew in each.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from safetensors import SafetensorError, deserialize

from blackpoint.data.bad_samples import BadSample, kind
from blackpoint.data.caption_text import json_captions, text_captions
from blackpoint.data.images.decode import BadImage, decode
from blackpoint.data.images.luminance import luminance
from blackpoint.data.images.picture_size import size_before_storing
from blackpoint.data.record import JSON, UNKNOWN, ShardRecords, Span
from blackpoint.data.shards.remote_shards import RemoteShards
from blackpoint.data.shards.sample_keys import AUTOMATIC, SampleKeys
from blackpoint.data.shards.shard_digest import ReadAlong, ShardContent
from blackpoint.data.shards.tar_samples import TarSample, tar_samples
from blackpoint.data.work.workers import Advance, run_in_processes

MAX_MEMBER_BYTES = (1 << 31) - 1
LATENTS = ("moments", "prompt_embeds")
ABSENT = ("no image", "no caption")
APART = "image and caption apart: they must follow each other in the tar, as after tar --sort=name"
FACT = np.dtype(
    [
        ("image_hash", "<u8"),  # of the file's bytes
        ("gradient_hash", "<u8"),  # of the picture; 0: flat, or latents
        ("caption_hash", "<u8"),
        ("key_hash", "<u8"),
        ("characters", "<u4"),  # of the longest caption
        ("words", "<u4"),  # of the caption with most
        ("captions", "<u4"),  # their number
    ]
)


@dataclass
class ShardScan:
    """Contents of one shard; `facts`, FACT, has a row for each of `records`."""

    records: ShardRecords
    facts: np.ndarray
    bad: list[BadSample]
    content: ShardContent = ShardContent()
    """Of a shard that could be read to its end."""


def scan_shard(
    shard: Path, max_image_pixels: int, latents: bool = False, keys: SampleKeys = AUTOMATIC
) -> ShardScan:
    """Reads a shard to its end, whatever is wrong with it.

    With `latents` a sample is a .safetensors member instead of an image; its record has no size.
    """
    records, bad = ShardRecords(), list[BadSample]()
    rows: list[tuple[int, ...]] = []
    kept: set[str] = set()
    incomplete: dict[str, dict[str, int]] = {}
    content = ShardContent()
    with ExitStack() as stack:
        file: BinaryIO | None = None
        with suppress(OSError):  # what can't be opened is named among what is bad
            file = stack.enter_context(shard.open("rb"))
            along = ReadAlong(file.fileno())
        for sample in tar_samples(shard, bad):
            assert file is not None, "its samples were read from it"
            try:
                row, image = _add(records, sample, file, max_image_pixels, latents, keys, kept)
            except BadImage as reason:
                shown = sample.key.encode("utf-8", "backslashreplace").decode()
                if kind(str(reason)) in ABSENT:
                    incomplete.setdefault(sample.key, {})[kind(str(reason))] = len(bad)
                bad.append(BadSample(f"{shard.name}:{shown}", str(reason)))
                continue
            rows.append(row)
            kept.add(sample.key)
            along.image(image.offset, image.size)
        if file is not None:
            content = along.content()
    for numbers in incomplete.values():
        if len(numbers) == len(ABSENT):
            for number in numbers.values():
                bad[number] = bad[number]._replace(reason=APART)
    return ShardScan(records, np.array(rows, FACT), bad, content)


def scan_shards(
    title: str,
    shards: Sequence[Path],
    max_image_pixels: int,
    num_processes: int = 1,
    latents: bool = False,
    remote: RemoteShards | None = None,
    keys: SampleKeys = AUTOMATIC,
) -> Iterator[tuple[str, ShardScan]]:
    """Yields name and scan of each shard, in order, read by several processes, behind a bar.

    A remote shard need not stay on the disk after its scan.
    """
    from blackpoint.data.work.progress import progress  # not for the processes that scan

    jobs = (
        (number, shard, remote and remote.only(shard.name), max_image_pixels, latents, keys)
        for number, shard in enumerate(shards)
    )
    waiting: dict[int, ShardScan] = {}
    following = 0
    with (
        progress(title, len(shards)) as advance,
        closing(run_in_processes(_scan_job, jobs, num_processes, advance)) as results,
    ):
        for number, scan in results:
            waiting[number] = scan
            while following in waiting:
                yield shards[following].name, waiting.pop(following)
                following += 1


_ScanJob = tuple[int, Path, RemoteShards | None, int, bool, SampleKeys]


def _scan_job(job: _ScanJob, advance: Advance) -> tuple[int, ShardScan]:
    number, shard, remote, max_image_pixels, latents, keys = job
    with remote.held(shard.name) if remote else nullcontext(shard) as path:
        scan = scan_shard(path, max_image_pixels, latents, keys)
        if remote:
            scan.content = scan.content._replace(stamp=remote.stamp(shard.name))
    advance(1)
    return number, scan


def gradient_hash(picture: Image.Image) -> int:
    """Returns 64 bits: where the picture, shrunk to 9 x 8 pixels, grows brighter to the right.

    Rescaled and recompressed copies mostly agree in all of them; a flat picture gives 0.
    """
    small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "little")


def _add(
    records: ShardRecords,
    sample: TarSample,
    file: BinaryIO,
    max_image_pixels: int,
    latents: bool,
    keys: SampleKeys,
    kept: set[str],
) -> tuple[tuple[int, ...], Span]:
    """Adds a usable sample and returns its FACT and where its image is; raises BadImage."""
    if sample.fault:
        raise BadImage(sample.fault)
    image_name = keys.image_member(sample.members, latents)
    _check_fault(sample, image_name)
    caption_name, form = keys.caption_member(sample.members)
    _check_fault(sample, caption_name)
    image, span = sample.members[image_name], sample.members[caption_name]
    content = _read(file, span)
    captions = json_captions(content, keys.field) if form == JSON else text_captions(content)
    image_bytes = _read(file, image)
    if latents:
        _check_latents(image_bytes)
        measures, gradient = (0, 0, 0.0), 0
    else:
        picture = decode(image_bytes, max_image_pixels)
        measures, gradient = (*picture.size, luminance(picture)), gradient_hash(picture)
    if sample.key in kept:
        raise BadImage("duplicate key: an earlier sample of this shard has it")
    original = UNKNOWN
    if "json" in sample.members and not latents:
        with suppress(BadImage):
            original = size_before_storing(_read(file, sample.members["json"]), *measures[:2])
    records.add(sample.key, image, span, *measures, form, original)
    hashes = (_hash(image_bytes), gradient, _hash("\0".join(captions).encode()))
    key_hash = _hash(sample.key.encode("utf-8", "backslashreplace"))
    longest = max(map(len, captions)), max(len(caption.split()) for caption in captions)
    return (*hashes, key_hash, *longest, len(captions)), image


def _check_fault(sample: TarSample, extension: str) -> None:
    fault = sample.member_faults.get(extension)
    if fault:
        raise BadImage(fault)


def _check_latents(content_bytes: bytes) -> None:
    try:
        names = {name for name, _ in deserialize(content_bytes)}
    except (SafetensorError, ValueError) as error:
        raise BadImage(f"damaged .safetensors: {error}") from None
    absent = [name for name in LATENTS if name not in names]
    if absent:
        raise BadImage(f"the .safetensors lacks {' and '.join(absent)}")


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _read(file: BinaryIO, span: Span) -> bytes:
    there = os.fstat(file.fileno()).st_size - span.offset
    if there < span.size:  # Asked first: a header may claim more than fits into memory.
        raise BadImage(f"truncated: {max(there, 0)} of {span.size} bytes")
    if span.size > MAX_MEMBER_BYTES:
        raise BadImage(f"too large: {span.size} bytes")
    try:
        return os.pread(file.fileno(), span.size, span.offset)
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror}") from None
