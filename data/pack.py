"""`blackpoint data pack`: an image folder with captions -> WebDataset shards and their index.

Image bytes are kept as they are; each becomes `key.jpg` (or .png, ...) beside `key.txt`, and a
.json of the same name beside the image comes along. Every image is decoded once: what training
could not use is left out here, counted and named. Everything is written into a folder beside the
output, which takes the output's name when it is whole.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from omegaconf import MISSING
from PIL import Image
from webdataset import TarWriter

from data.bad_samples import BadSample, refusal, too_many
from data.captions import (
    CaptionedFile,
    CaptionForm,
    captioned_files,
    count_files,
    find_captions,
)
from data.decode import MAX_IMAGE_PIXELS, BadImage, decode
from data.errors import UserError
from data.index import IndexWriter, Span
from data.progress import progress

NUM_BAD_BEFORE_STOP = 100


@dataclass
class PackConfig:
    """An image folder with captions, and the shards that it becomes."""

    source: str = MISSING
    """Folder of images (jpg, png, webp, bmp, gif, tiff), searched recursively."""
    output: str = MISSING
    """Folder for the shards and the index; must be absent or empty."""
    captions: CaptionForm = "auto"
    """Where captions are; auto finds the one kind there is and says which."""
    file_column: str = "file_name"
    """Column of a captions table that names the image, relative to source."""
    caption_column: str = "text"
    """Column of a captions table that holds the caption."""
    samples_per_shard: int = 10_000
    """Most samples in one shard."""
    shard_megabytes: float = 1000.0
    """Size at which a shard is full, in 10^6 bytes."""
    max_bad_share: float = 0.01
    """Share of samples that may be left out before the run stops, 0 to 1."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Images with more pixels are refused as decompression bombs."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(f"samples_per_shard={self.samples_per_shard}: must be at least 1.")
        if not self.shard_megabytes > 0:
            raise UserError(f"shard_megabytes={self.shard_megabytes}: must be above 0.")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share={self.max_bad_share}: must be from 0 to 1.")
        if self.max_image_pixels < 1:
            raise UserError(f"max_image_pixels={self.max_image_pixels}: must be at least 1.")


@dataclass
class PackResult:
    """What was packed and what was not."""

    caption_source: str
    num_samples: int = 0
    num_shards: int = 0
    bad: list[BadSample] = field(default_factory=list)
    ignored_suffixes: dict[str, int] = field(default_factory=dict)


def pack(config: PackConfig) -> PackResult:
    """Packs `config.source` into `config.output`; raises UserError and leaves nothing behind."""
    source, output = Path(config.source), Path(config.output)
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise UserError(f"source={source}: {what}. Name a folder of images.")
    refuse_used_output(output)
    count = count_files(source)
    if not count.num_images:
        found = ", ".join(f"{num} .{suffix}" for suffix, num in count.other_suffixes.items())
        raise UserError(
            f"source={source}: holds no images (found {found or 'nothing'}). "
            "Images are jpg, jpeg, png, webp, bmp, gif, tif or tiff files."
        )
    captions = find_captions(
        source, config.captions, config.file_column, config.caption_column, count
    )
    result = PackResult(str(captions), ignored_suffixes=count.other_suffixes)
    with (
        written_beside(output) as partial,
        IndexWriter(partial) as index,
        progress("packing", count.num_images) as advance,
    ):
        shards = ShardWriter(partial, config.samples_per_shard, config.shard_megabytes * 1e6)
        try:
            for entry in captioned_files(captions):
                _pack_one(entry, shards, index, config.max_image_pixels, result.bad)
                advance()
                # A folder that is bad throughout is not read to its end to say so.
                if len(result.bad) >= NUM_BAD_BEFORE_STOP and too_many(
                    len(result.bad), count.num_images, config.max_bad_share
                ):
                    break
        finally:
            shards.close()
        num_seen = index.num_samples + len(result.bad)
        if too_many(len(result.bad), num_seen, config.max_bad_share) or not index.num_samples:
            raise refusal(
                f"source={source}", result.bad, num_seen, config.max_bad_share, "max_bad_share"
            )
        index.close(shards.paths, result.bad)
    result.num_samples, result.num_shards = index.num_samples, len(shards.paths)
    return result


class ShardWriter:
    """Writes shard-000000.tar, shard-000001.tar, ... and tells where each member went."""

    def __init__(self, folder: Path, max_samples: int, max_bytes: float) -> None:
        self.folder = folder
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.paths: list[Path] = []
        self._file: BinaryIO | None = None
        self._num_samples = 0

    def write(self, key: str, members: dict[str, bytes]) -> dict[str, Span]:
        """Appends one sample, to a new shard if this one is full; returns the members' places."""
        if self._file is None or self._num_samples >= self.max_samples or self._is_large():
            self._next_shard()
        self._num_samples += 1
        spans = {}
        for extension, content in members.items():
            # One member a call: the data ends, padded to whole blocks, where the tar stands now.
            self._tar.write({"__key__": key, extension: content})
            padded = -(-len(content) // 512) * 512
            spans[extension] = Span(self._tar.tarstream.offset - padded, len(content))
        return spans

    def close(self) -> None:
        """Ends the shard that is being written."""
        if self._file is not None:
            self._tar.close()
            self._file.close()
            self._file = None

    def _is_large(self) -> bool:
        return self._tar.tarstream.offset >= self.max_bytes

    def _next_shard(self) -> None:
        self.close()
        self.paths.append(self.folder / f"shard-{len(self.paths):06d}.tar")
        self._file = self.paths[-1].open("wb")
        # GNU format: names of any length. mtime 0: the same folder gives the same bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0, format="GNU_FORMAT")
        self._num_samples = 0


def refuse_used_output(output: Path) -> None:
    """Raises UserError unless `output` is absent or an empty folder."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"output={output}: is not empty. Name another folder or empty it.")
    elif output.exists():
        raise UserError(f"output={output}: is a file. Name a folder.")


@contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """Yields a new folder beside `output` that takes its name at the end, or vanishes."""
    output = output.absolute()
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output={output}: can't be written: {error.strerror}.") from None
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pack_one(
    entry: CaptionedFile | BadSample,
    shards: ShardWriter,
    index: IndexWriter,
    max_image_pixels: int,
    bad: list[BadSample],
) -> None:
    if isinstance(entry, BadSample):
        bad.append(entry)
        return
    try:
        image_bytes, picture = _read(entry.path, max_image_pixels)
    except BadImage as reason:
        bad.append(BadSample(entry.name, str(reason)))
        return
    suffix = entry.path.suffix[1:].lower()
    members = {suffix: image_bytes, "txt": entry.caption.encode()}
    extra = entry.path.with_suffix(".json")
    if extra.is_file():
        members["json"] = extra.read_bytes()
    spans = shards.write(entry.key, members)
    index.add(len(shards.paths) - 1, entry.key, spans[suffix], spans["txt"], picture)


def _read(path: Path, max_image_pixels: int) -> tuple[bytes, Image.Image]:
    try:
        image_bytes = path.read_bytes()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror}") from None
    return image_bytes, decode(image_bytes, max_image_pixels)
