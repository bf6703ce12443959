"""`blackpoint data pack`: an image folder with captions -> WebDataset shards and their index.

Image bytes are kept as they are; each becomes `key.jpg` (or .png, ...) beside `key.txt`, and a
.json of the same name beside the image comes along. Several captions go into `key.json`, no .txt
(data/caption_text.py). Every image is decoded once: what training could not use is left out here,
counted and named.

Names and sizes alone decide which image goes into which shard (data/pack/shard_list.py). Processes
then write whole shards (data/pack/pack_shard.py), and the same bytes come out for any number of
them. A run that was stopped is continued by the same command (data/work/partial.py).
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from blackpoint.data.bad_samples import BadSample, refusal, too_many
from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed, disk_writes
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.data.images.decode import MAX_IMAGE_PIXELS
from blackpoint.data.index.index import IndexWriter
from blackpoint.data.pack.captions import (
    CaptionFields,
    CaptionForm,
    CaptionSource,
    captioned_files,
    find_captions,
)
from blackpoint.data.pack.image_folder import FolderCount, count_files
from blackpoint.data.pack.pack_shard import ShardRules, is_hopeless, pack_shard
from blackpoint.data.pack.shard_list import ShardList, shard_lists
from blackpoint.data.shards.shard_file import shard_name
from blackpoint.data.work.part import Part, finished_part, part_path, read_part, shard_content_of
from blackpoint.data.work.partial import Partial, refuse_used_output
from blackpoint.data.work.progress import progress
from blackpoint.data.work.workers import run_in_processes, usable_cores


@dataclass
class PackConfig(CaptionFields):
    """An image folder with captions, and the shards that it becomes."""

    source: PathText = MISSING
    """Folder of images (jpg, png, webp, bmp, gif, tiff, avif), or of Parquet files with images
    inside; searched recursively."""
    output: OutputText = MISSING
    """Folder for the shards and the index; must be absent or empty. A run that was stopped is
    continued by the same command."""
    captions: CaptionForm = "auto"
    """Where captions are: in a .txt (sidecar), .caption or .json beside each image, in a table, or
    in kohya's meta_cap.json; auto finds the one kind there is and says which."""
    captions_file: PathText | None = None
    """Table of captions, relative to source, or a pattern such as 'train-*.parquet' for several
    that are one; null: the one there is."""
    samples_per_shard: int = 10_000
    """Most samples in one shard."""
    shard_megabytes: float = 1000.0
    """Size at which a shard is full, in 10^6 bytes."""
    max_bad_share: float = 0.01
    """Share of samples that may be left out before the run stops, 0 to 1."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Images with more pixels are refused as decompression bombs."""
    num_processes: int = 0
    """Processes that decode and write, each a shard at a time; 0: one per CPU core that it may use.
    The output does not depend on it."""

    def __post_init__(self) -> None:
        if not self.shard_megabytes > 0:
            raise UserError(f"shard_megabytes={self.shard_megabytes}: must be above 0")
        check_ranges(self, "", samples_per_shard=">= 1", max_bad_share=">= 0 and <= 1")
        check_ranges(self, "", max_image_pixels=">= 1", num_processes=">= 0")


@dataclass
class PackResult:
    """Counts of packed and left-out samples."""

    caption_source: str
    num_samples: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    """Of all shards."""
    num_kept_shards: int = 0
    """Shards that an earlier run had finished."""
    num_read: int = 0
    """Samples that this run read, good or bad."""
    seconds: float = 0.0
    bad: list[BadSample] = field(default_factory=list)
    ignored_suffixes: dict[str, int] = field(default_factory=dict)


def pack(config: PackConfig) -> PackResult:
    """Packs `config.source` into `config.output`, which appears when it is whole.

    Raises UserError, and RunFailed for a full disk or a killed process; finished shards are kept
    beside the output for the next call.
    """
    start = time.monotonic()
    source, output = Path(config.source), Path(config.output)
    count, captions = source_contents(config)
    Partial(output, {}).tidy()
    refuse_used_output(output)
    num_images = captions.num_embedded() if captions.is_embedded else count.num_images
    ignored = {name: num for name, num in count.other_suffixes.items() if name != captions.form}
    result = PackResult(str(captions), ignored_suffixes=ignored)
    with Partial(output, _settings(config, captions)) as partial:
        try:
            rules = ShardRules(
                source,
                partial.shards,
                partial.parts,
                partial.own_folder(),
                config.max_image_pixels,
                config.max_bad_share,
                num_images,
                config.image_column,
            )
            shards = _Shards(config, rules, result)
            with progress("packing", num_images) as advance:
                shards.write(captions, advance)
            _write_index(rules, shards.count, result)
            partial.finish()
        except (WriteFailed, RunFailed) as error:
            raise partial.failure(error, "num_processes=1 needs least memory") from error
    result.seconds = time.monotonic() - start
    return result


def source_contents(config: PackConfig) -> tuple[FolderCount, CaptionSource]:
    """Returns the contents of the source; raises UserError where there are no images."""
    source = Path(config.source)
    if not os.path.isdir(source):  # False for a name that is too long
        what = "is a file" if os.path.exists(source) else "does not exist"
        raise UserError(f"source={source}: {what}; name a folder of images")
    count = count_files(source)
    if count.num_images or "parquet" in count.other_suffixes or config.captions_file:
        captions = find_captions(source, config.captions, config, count, config.captions_file)
        if captions.num_embedded() if captions.is_embedded else count.num_images:
            return count, captions
    kinds = ", ".join(f"{num} .{suffix}" for suffix, num in count.other_suffixes.items())
    raise UserError(
        f"source={source}: holds no images (found {kinds or 'nothing'}); "
        "images are jpg, jpeg, png, webp, bmp, gif, tif, tiff or avif files, or inside Parquet"
    )


def _settings(config: PackConfig, captions: CaptionSource) -> dict[str, object]:
    """Returns the settings that a continued run must share with the stopped one."""
    return {
        "source": os.path.realpath(config.source),
        "captions": str(captions),
        "samples_per_shard": config.samples_per_shard,
        "shard_megabytes": config.shard_megabytes,
        "max_image_pixels": config.max_image_pixels,
    }


class _Shards:
    """The shards of a pack: finished ones, those being written, and bad samples."""

    def __init__(self, config: PackConfig, rules: ShardRules, result: PackResult) -> None:
        self.config, self.rules, self.result = config, rules, result
        self.count, self.num_seen = 0, 0
        self._bad: dict[int, list[BadSample]] = {}

    def write(self, captions: CaptionSource, advance: Callable[[int], None]) -> None:
        """Writes every shard that is not finished; raises UserError where too much is bad."""
        work = functools.partial(pack_shard, self.rules)
        num_processes = self.config.num_processes or usable_cores()
        parts = run_in_processes(work, self._unfinished(captions, advance), num_processes, advance)
        with contextlib.closing(parts):
            for part in parts:
                self.result.num_read += part.num_entries
                self._count(part)
        self.result.bad = self._bad_in_order()
        self._refuse_too_many()

    def _unfinished(
        self, captions: CaptionSource, advance: Callable[[int], None]
    ) -> Iterator[ShardList]:
        rules, entries = self.rules, captioned_files(captions)
        limits = (self.config.samples_per_shard, self.config.shard_megabytes * 1e6)
        for listed in shard_lists(entries, rules.source, rules.working, *limits):
            self.count += 1
            part = finished_part(rules.parts, rules.shards, listed.number, listed.digest)
            if part is None:
                with disk_writes():
                    part_path(rules.parts, listed.number).unlink(missing_ok=True)
                yield listed
                continue
            listed.path.unlink()
            self.result.num_kept_shards += 1
            advance(part.num_entries)
            self._count(part)

    def _count(self, part: Part) -> None:
        self.num_seen += part.num_entries
        if part.bad:
            self._bad[part.number] = part.bad
        num_bad = sum(map(len, self._bad.values()))
        if not part.is_whole or (part.bad and is_hopeless(num_bad, self.rules)):
            raise self._refusal()

    def _bad_in_order(self) -> list[BadSample]:
        return [sample for number in sorted(self._bad) for sample in self._bad[number]]

    def _refusal(self) -> UserError:
        share, source = self.rules.max_bad_share, f"source={self.config.source}"
        return refusal(source, self._bad_in_order(), self.num_seen, share, "max_bad_share")

    def _refuse_too_many(self) -> None:
        share, num_bad = self.rules.max_bad_share, len(self.result.bad)
        is_empty = self.num_seen == num_bad
        if not is_empty and not too_many(num_bad, self.num_seen, share):
            return
        for number, samples in self._bad.items():
            # A shard that is too much by itself is not worth keeping: it must be repaired.
            if is_empty or too_many(len(samples), self.num_seen, share):
                part_path(self.rules.parts, number).unlink(missing_ok=True)
        raise self._refusal()


def _write_index(rules: ShardRules, num_shards: int, result: PackResult) -> None:
    """Numbers the shards that hold samples without gaps and writes their index."""
    with disk_writes(), IndexWriter(rules.shards, rules.working) as index:
        index.bad, paths = result.bad, list[Path]()
        for number in range(num_shards):
            part, records = read_part(part_path(rules.parts, number))
            path = rules.shards / shard_name(number)
            if not part.num_samples:
                path.unlink(missing_ok=True)
                continue
            content = shard_content_of(part, path, records)
            paths.append(rules.shards / shard_name(len(paths)))
            index.append(paths[-1].name, records, content)
            if path != paths[-1]:
                # Stopped from here on, the shards after the gap are written anew.
                part_path(rules.parts, number).unlink()
                path.replace(paths[-1])
            result.num_bytes += part.num_bytes
        for path in set(rules.shards.glob("*.tar")) - set(paths):
            path.unlink()  # of a source that held more when the run began
        index.close()
        result.num_samples, result.num_shards = index.num_samples, len(paths)
