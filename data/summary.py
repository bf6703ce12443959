"""Summary of the training data: the share of each data set, the images of each bucket."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from blackpoint.data.bad_samples import printable
from blackpoint.data.images.decode import STORED_COLORS
from blackpoint.data.order.buckets import square
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import is_encoded

NUM_NAMED = 5  # of the samples that are left out
ROWS_AT_ONCE = 1 << 16
MAX_ROWS = 1 << 21
"""Sizes that are looked at for a count; of more, as many are, in pieces all over the index."""


class BucketRow(NamedTuple):
    """How many images of a data set are cut to one size; size (0, 0): left out."""

    data_set: str
    width: int
    height: int
    num_images: int
    num_enlarged: int


def bucket_rows(readers: Mapping[str, Reader]) -> Iterator[BucketRow]:
    """Yields the buckets that hold images, and left-out samples, of readers by "field=value"."""
    for name, reader in readers.items():
        if reader.order is None:
            continue
        samples = reader.order.samples
        sizes = samples.buckets.sizes
        for size, count, enlarged in zip(sizes, samples.counts, samples.num_enlarged, strict=True):
            if count:
                yield BucketRow(name, *size, count, enlarged)
        if samples.num_left_out:
            yield BucketRow(name, 0, 0, samples.num_left_out, 0)


def summary_lines(
    readers: Mapping[str, Reader], parts: Sequence[int] | None, batch_size: int
) -> list[str]:
    """Returns lines for the user: an old decoder, shares of a mixture, images of each bucket, and
    how many are enlarged.

    `readers` are those of training first; `parts` are the whole weights of a mixture.
    """
    lines = decoder_lines(readers.values())
    if parts:
        lines += ["data.mixture:", *mixture_lines(list(readers.values())[: len(parts)], parts)]
    for name, reader in readers.items():
        lines += bucket_lines(name, reader, batch_size) if reader.order else []
        what = f"data.resolution={reader.resolution}; lower it, or leave them out with "
        lines += enlarged_lines(name, reader, f"{what}data.max_upscale=1")
    return lines


def enlarged_lines(name: str, reader: Reader, what: str) -> list[str]:
    """Returns a warning of how many images are enlarged to cover their square or bucket, or [].

    `what` is the end of it: to which size, and the remedy. Latents were warned of when they were
    made.
    """
    if is_encoded(reader.index.shard_folder):
        return []
    if reader.order:
        rows = [row for row in bucket_rows({name: reader}) if row.width]
        num_enlarged = sum(row.num_enlarged for row in rows)
        num_images, about = sum(row.num_images for row in rows), ""
    else:
        num_images = len(reader)
        num_enlarged, num_seen = _num_smaller(reader)
        about = "about " if num_seen < num_images else ""
        num_enlarged = round(num_enlarged / num_seen * num_images)
    if not num_enlarged:
        return []
    return [
        f"WARNING: {name}: {about}{num_enlarged:,} of {num_images:,} images are enlarged to {what}"
    ]


def _num_smaller(reader: Reader) -> tuple[int, int]:
    """Returns how many images have a side below that of their square or bucket, of how many that
    were looked at."""
    buckets = reader.buckets or square(reader.resolution, None)
    pieces = [
        range(first, min(first + ROWS_AT_ONCE, samples.stop))
        for samples in reader.chosen
        for first in range(samples.start, samples.stop, ROWS_AT_ONCE)
    ]
    every = max(1, len(reader) // MAX_ROWS)
    num_smaller = num_seen = 0
    for piece in pieces[::every]:
        rows = reader.index.read(piece.start, piece.stop)
        sides = rows["width"], rows["height"]
        num_smaller += int(buckets.is_enlarged(*sides, buckets.assign(*sides)).sum())
        num_seen += len(rows)
    return num_smaller, num_seen


def write_buckets(path: Path, rows: Sequence[BucketRow]) -> None:
    """Writes the rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(BucketRow._fields)
        writer.writerows(rows)


def decoder_lines(readers: Iterable[Reader]) -> list[str]:
    """Returns a note on a run that goes on with an earlier decoder."""
    if not any(type(reader) is Reader and reader.decoder == STORED_COLORS for reader in readers):
        return []
    return [
        "note: the run was begun before images were converted to sRGB by their colour profiles; it "
        "goes on with colours as they are stored; a new run converts them"
    ]


def mixture_lines(readers: Sequence[Reader], parts: Sequence[int]) -> list[str]:
    """Returns a line for each data set of a mixture: its share, and how often it is gone through.

    `parts` are the whole weights. The passes are those that 10^6 samples of the mixture make.
    """
    lines = []
    for reader, part in zip(readers, parts, strict=True):
        share = part / sum(parts)
        passes = share * 1e6 / len(reader)
        lines.append(
            f"  {reader.name}: {share:.2%} of the samples, from {len(reader):,} "
            f"({passes:.3g} passes in a million samples)"
        )
    return lines


def bucket_lines(name: str, reader: Reader, batch_size: int) -> list[str]:
    """Returns the table of one data set's buckets, and notes on it."""
    assert reader.order is not None
    rows = [row for row in bucket_rows({name: reader}) if row.width]
    total = sum(row.num_images for row in rows)
    lines = [f"{name}: {total:,} images, {len(rows)} sizes", "   width  height      images   share"]
    for row in sorted(rows, key=lambda row: row.width / row.height):
        enlarged = f"  {row.num_enlarged:,} enlarged" if row.num_enlarged else ""
        share = f"{row.num_images / total:>8.1%}"
        lines.append(f"{row.width:>8}{row.height:>8}{row.num_images:>12,}{share}{enlarged}")
    few = [row for row in rows if row.num_images < batch_size]
    if few and reader.order.batch_size > 1:
        lines.append(
            f"  {len(few)} sizes have fewer images than a batch of {batch_size}: a batch of theirs "
            "comes every few epochs and shows images more than once (fewer sizes: "
            "data.buckets.max_aspect, step_px)"
        )
    left_out = reader.order.samples.num_left_out
    if left_out:
        limit = reader.order.samples.buckets.max_upscale
        left = reader.order.samples.left_out(NUM_NAMED)
        names = [printable(reader.key(reader.offset + index)) for index in left]
        more = ", ..." if left_out > len(names) else ""
        lines.append(
            f"  left out: {left_out:,} that would be enlarged by more than "
            f"data.max_upscale={limit:g}: {', '.join(names)}{more}"
        )
    return lines
