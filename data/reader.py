"""Captioned images by position in an endless concatenation of epoch permutations.

Position n of a data set of N samples is pass n // N, sample permute(n % N): the order of all
epochs is a function of the seed, position 10^6 costs what position 0 costs, and any process can
read any position. A sample that can't be decoded is replaced by one that (seed, epoch, index)
chooses; the batch names it. With buckets, data/order/order.py says which sample is where, and a
sample is replaced by one of its bucket; where none of that is usable, by any other, cut to the same
size.
"""

import bisect
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blackpoint.data.bad_samples import BadSample, listing
from blackpoint.data.caption_text import Captions, json_captions, text_captions
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import MAX_IMAGE_PIXELS, BadImage, decode
from blackpoint.data.images.picture_size import READER_VERSION, PictureSize
from blackpoint.data.index.index import Index
from blackpoint.data.order.buckets import Buckets, Size, bucket_of
from blackpoint.data.order.order import BucketOrder, Place
from blackpoint.data.order.permutation import permute
from blackpoint.data.record import JSON, Span
from blackpoint.data.shards.remote_shards import RemoteShards
from blackpoint.data.transform import CENTER, caption_number, draw, picture_size, transform

MAX_REPLACEMENTS = 100
MAX_FROM_BUCKET = 20
MAX_OPEN_SHARDS = 128


class View(NamedTuple):
    """One view of an image: pixels uint8 (H, W, 3), and where they are in what is stored."""

    pixels: np.ndarray
    size: PictureSize


@dataclass
class Reader:
    """Reads, transforms and collates samples of the chosen shards of an index.

    In a mixture, `name` goes before the keys and `offset` is added to every index that is passed or
    returned, so that both are unique.
    """

    index: Index
    shards: Sequence[Path]
    seed: int
    resolution: int
    crop: str = "random"
    flip: bool = False
    caption_dropout: float = 0.0
    max_image_pixels: int = MAX_IMAGE_PIXELS
    remote: RemoteShards | None = None
    """Where shards are that are no files here."""
    order: BucketOrder | None = None
    buckets: Buckets | None = None
    """Sizes that images are cut to where there is no order; None: the square."""
    name: str = ""
    offset: int = 0
    decoder: int = READER_VERSION
    """Version of the decoder, and of sizes: data/images/picture_size.py."""
    _files: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.resolution > 0, "0 is for train/records/sizes.py to replace"
        if self.remote is None:
            self.index.check_shards(self.shards)
        self.chosen = sorted(
            (self.index.shard_samples[path.name] for path in self.shards), key=attrgetter("start")
        )
        """The samples of the chosen shards, as the index counts them, in its order."""
        self._totals = list(itertools.accumulate(map(len, self.chosen)))
        if not self._totals[-1]:
            raise UserError(f"{self.index.shard_folder}: the chosen shards hold no usable sample")

    def __len__(self) -> int:
        return self._totals[-1]

    @property
    def has_original_sizes(self) -> bool:
        """Whether sizes are given that pictures had before they were stored."""
        return self.decoder >= READER_VERSION and self.index.has_original_sizes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def sample_index(self, number: int) -> int:
        """Returns the index of the `number`-th sample of the chosen shards."""
        shard = bisect.bisect_right(self._totals, number)
        return self.offset + self.chosen[shard].stop + number - self._totals[shard]

    def place(self, position: int) -> Place:
        """Returns which sample training reads at `position`, 0 the first of the first pass."""
        if self.order is not None:
            place = self.order.place(position)
            return Place(place.epoch, self.offset + place.index, position)
        epoch, offset = divmod(position, len(self))
        stream = f"/{self.name}" if self.name else ""
        index = self.sample_index(permute(offset, len(self), self.seed, epoch, stream))
        return Place(epoch, index, position)

    def batch(self, positions: Iterable[int]) -> dict[str, Any]:
        """Returns the training batch of some positions, randomly cropped, captions dropped."""
        return self.collate([self.place(position) for position in positions], training=True)

    def collate(self, places: Sequence[Place], training: bool) -> dict[str, Any]:
        """Returns `stack`'s tensors, caption, key, epoch, index and position int64 (B,), replaced.

        `replaced` lists what could not be used, as (index, BadSample), and is mostly empty.
        """
        return collate([(self, place) for place in places], training)

    def key(self, index: int) -> str:
        """Returns the name of a sample for the user."""
        key = self.index.key(index - self.offset)
        return f"{self.name}:{key}" if self.name else key

    def size(self, index: int) -> Size | None:
        """Returns the width and height that a sample is cut to; None where it is left out."""
        buckets = self.order.samples.buckets if self.order else self.buckets
        if buckets is None:
            return self.resolution, self.resolution
        bucket = self._bucket(index, buckets)
        return buckets.sizes[bucket] if bucket < len(buckets.sizes) else None

    def stack(self, contents: Sequence[Any]) -> dict[str, Tensor]:
        """Returns image uint8 (B, 3, H, W) and sizes int64 (B, 6), rows of PictureSize, of what
        `read` returned, all of one size."""
        height, width, _ = contents[0].pixels.shape
        images = np.empty((len(contents), 3, height, width), np.uint8)
        for row, view in enumerate(contents):
            images[row] = view.pixels.transpose(2, 0, 1)
        sizes = torch.tensor([view.size for view in contents])
        return {"image": torch.from_numpy(images), "sizes": sizes}

    def read(
        self, epoch: int, index: int, training: bool, size: Size | None = None
    ) -> tuple[Any, str]:
        """Returns the View and caption of one sample; raises BadImage.

        It is cut to `size`, by default to its own.
        """
        view, captions = self.read_all(epoch, index, training, size)
        number = self.caption_index(epoch, index, training, len(captions))
        return view, "" if number is None else captions[number]

    def read_all(
        self, epoch: int, index: int, training: bool, size: Size | None = None
    ) -> tuple[Any, Captions]:
        """Returns what `read` does, with all captions of the sample."""
        image_bytes, captions = self.members(index)
        draws = draw(self.seed, epoch, index) if training else CENTER
        crop = draws if self.crop == "random" else CENTER
        image = decode(image_bytes, self.max_image_pixels, self.decoder)
        flip = self.flip and draws.flip < 0.5
        size = size or self.size(index)
        assert size is not None, "what is left out is not read"
        pixels = transform(image, size, crop.crop_x, crop.crop_y, flip)
        view_size = picture_size(*image.size, size, crop.crop_x, crop.crop_y, flip)
        if self.has_original_sizes and (before := self.index.original_size(index - self.offset)):
            view_size = view_size._replace(original_width=before[0], original_height=before[1])
        return View(pixels, view_size), captions

    def caption_index(self, epoch: int, index: int, training: bool, count: int) -> int | None:
        """Returns which of `count` captions is a sample's, None where it is dropped.

        In validation it is the first.
        """
        if not training:
            return 0
        if draw(self.seed, epoch, index).caption_dropout < self.caption_dropout:
            return None
        return caption_number(self.seed, epoch, index, count)

    def members(self, index: int) -> tuple[bytes, Captions]:
        """Returns the bytes of the image (or latents), and the captions; raises BadImage."""
        record = self.index.record(index - self.offset)
        image = Span(int(record["image_offset"]), int(record["image_size"]))
        caption = Span(int(record["caption_offset"]), int(record["caption_size"]))
        image_bytes, caption_bytes = self._bytes(int(record["shard"]), [image, caption])
        if record["caption_form"] == JSON:
            return image_bytes, json_captions(caption_bytes, self.index.keys.field)
        return image_bytes, text_captions(caption_bytes)

    def usable(
        self, place: Place, training: bool, replaced: list[tuple[int, BadSample]]
    ) -> tuple[int, Any, str]:
        """Returns the sample at `place`, or the first usable of those that would replace it."""
        candidate, size = place.index, self.size(place.index)
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return candidate, *self.read(place.epoch, candidate, training, size)
            except BadImage as reason:
                replaced.append((candidate, BadSample(self.key(candidate), str(reason))))
            parts = f"replacement/{self.seed}/{place.epoch}/{place.index}/{attempt}".encode()
            number = int.from_bytes(blake2b(parts, digest_size=8).digest(), "little")
            candidate = self._replacement(place.index, number, attempt)
        bad = list(dict.fromkeys(sample for _, sample in replaced))
        raise UserError(
            f"{self.index.shard_folder}: {MAX_REPLACEMENTS} samples in a row can't be used; "
            f"pack the data set again:\n{listing(bad)}"
        )

    def _replacement(self, index: int, number: int, attempt: int) -> int:
        if self.order is None:
            return self.sample_index(number % len(self))
        buckets = self.order.samples.buckets
        bucket = self._bucket(index, buckets) if attempt < MAX_FROM_BUCKET else None
        return self.offset + self.order.replacement(bucket, number)

    def _bucket(self, index: int, buckets: Buckets) -> int:
        record = self.index.record(index - self.offset)
        return bucket_of(buckets, int(record["width"]), int(record["height"]))

    def _bytes(self, shard: int, spans: Sequence[Span]) -> list[bytes]:
        name = self.index.shard_names[shard]
        try:
            if self.remote:
                contents = self.remote.read(name, spans)
            else:
                contents = [os.pread(self._file(shard), span.size, span.offset) for span in spans]
        except OSError as error:
            raise BadImage(f"{name}: {error.strerror}") from None
        if any(len(content) < span.size for content, span in zip(contents, spans, strict=True)):
            raise BadImage(f"{name} ends within the sample")
        return contents

    def _file(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is None:
            while len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.shards[0].parent / self.index.shard_names[shard]
            descriptor = self._files[shard] = os.open(path, os.O_RDONLY)
        return descriptor

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def collate(places: Sequence[tuple[Reader, Place]], training: bool) -> dict[str, Any]:
    """Returns the batch of some places, each with its reader; see `Reader.collate`."""
    contents, captions, keys, indices = [], [], [], []
    replaced: list[tuple[int, BadSample]] = []
    for reader, place in places:
        index, content, caption = reader.usable(place, training, replaced)
        contents.append(content)
        captions.append(caption)
        keys.append(reader.key(index))
        indices.append(index)
    return places[0][0].stack(contents) | {
        "caption": captions,
        "key": keys,
        "epoch": torch.tensor([place.epoch for _, place in places]),
        "index": torch.tensor(indices),
        "position": torch.tensor([place.position for _, place in places]),
        "replaced": replaced,
    }
