"""Captioned images by position in an endless concatenation of epoch permutations.

Position n of a data set of N samples is pass n // N, sample permute(n % N): the order of all
epochs is a function of the seed, position 10^6 costs what position 0 costs, and any process can
read any position. A sample that can't be decoded is replaced by one that (seed, epoch, index)
chooses; the batch names it.
"""

import bisect
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.bad_samples import BadSample, listing
from data.decode import MAX_IMAGE_PIXELS, BadImage, decode, decode_caption
from data.errors import UserError
from data.index import Index
from data.permutation import permute
from data.transform import CENTER, draw, transform

MAX_REPLACEMENTS = 100
MAX_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Place:
    """Which sample of the index, and in which pass."""

    epoch: int
    index: int


@dataclass
class Reader:
    """Reads, transforms and collates samples of the chosen shards of an index."""

    index: Index
    shards: Sequence[Path]
    seed: int
    resolution: int
    crop: str = "random"
    flip: bool = False
    caption_dropout: float = 0.0
    max_image_pixels: int = MAX_IMAGE_PIXELS
    _files: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.index.check_shards(self.shards)
        chosen = sorted(
            (self.index.shard_samples[path.name] for path in self.shards), key=attrgetter("start")
        )
        self._starts = [samples.start for samples in chosen]
        self._totals = list(itertools.accumulate(len(samples) for samples in chosen))
        if not self._totals[-1]:
            raise UserError(f"{self.index.shard_folder}: the chosen shards hold no usable sample.")

    def __len__(self) -> int:
        return self._totals[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def sample_index(self, number: int) -> int:
        """Returns the index of the `number`-th sample of the chosen shards."""
        shard = bisect.bisect_right(self._totals, number)
        before = self._totals[shard - 1] if shard else 0
        return self._starts[shard] + number - before

    def place(self, position: int) -> Place:
        """Returns which sample training reads at `position`, 0 the first of the first pass."""
        epoch, offset = divmod(position, len(self))
        return Place(epoch, self.sample_index(permute(offset, len(self), self.seed, epoch)))

    def batch(self, positions: Iterable[int]) -> dict[str, Any]:
        """Returns the training batch of some positions, randomly cropped, captions dropped."""
        return self.collate([self.place(position) for position in positions], training=True)

    def collate(self, places: Sequence[Place], training: bool) -> dict[str, Any]:
        """Returns image uint8 (B, 3, H, W), caption, key, epoch and index int64 (B,), replaced.

        `replaced` lists what could not be used, as (index, BadSample), and is mostly empty.
        """
        size = self.resolution
        images = np.empty((len(places), 3, size, size), np.uint8)
        captions, keys, indices = [], [], []
        replaced: list[tuple[int, BadSample]] = []
        for row, place in enumerate(places):
            index, pixels, caption = self._usable(place, training, replaced)
            images[row] = pixels.transpose(2, 0, 1)
            captions.append(caption)
            keys.append(self.index.key(index))
            indices.append(index)
        return {
            "image": torch.from_numpy(images),
            "caption": captions,
            "key": keys,
            "epoch": torch.tensor([place.epoch for place in places]),
            "index": torch.tensor(indices),
            "replaced": replaced,
        }

    def read(self, epoch: int, index: int, training: bool) -> tuple[np.ndarray, str]:
        """Returns pixels uint8 (H, W, 3) and caption of one sample; raises BadImage."""
        record = self.index.record(index)
        shard = int(record["shard"])
        image_bytes = self._bytes(shard, record["image_offset"], record["image_size"])
        caption_bytes = self._bytes(shard, record["caption_offset"], record["caption_size"])
        draws = draw(self.seed, epoch, index) if training else CENTER
        crop = draws if self.crop == "random" else CENTER
        image = decode(image_bytes, self.max_image_pixels)
        flip = self.flip and draws.flip < 0.5
        pixels = transform(image, self.resolution, crop.crop_x, crop.crop_y, flip)
        caption = decode_caption(caption_bytes)
        return pixels, "" if draws.caption_dropout < self.caption_dropout else caption

    def _usable(
        self, place: Place, training: bool, replaced: list[tuple[int, BadSample]]
    ) -> tuple[int, np.ndarray, str]:
        """Returns the sample at `place`, or the first usable of those that would replace it."""
        candidate = place.index
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return candidate, *self.read(place.epoch, candidate, training)
            except BadImage as reason:
                replaced.append((candidate, BadSample(self.index.key(candidate), str(reason))))
            parts = f"replacement/{self.seed}/{place.epoch}/{place.index}/{attempt}".encode()
            number = int.from_bytes(blake2b(parts, digest_size=8).digest(), "little")
            candidate = self.sample_index(number % len(self))
        bad = list(dict.fromkeys(sample for _, sample in replaced))
        raise UserError(
            f"{self.index.shard_folder}: {MAX_REPLACEMENTS} samples in a row can't be used. "
            f"Pack the data set again:\n{listing(bad)}"
        )

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            found = os.pread(self._file(shard), int(size), int(offset))
        except OSError as error:
            raise BadImage(f"{self.index.shard_names[shard]}: {error.strerror}") from None
        if len(found) < size:
            raise BadImage(f"{self.index.shard_names[shard]} ends within the sample")
        return found

    def _file(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is None:
            while len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.index.shard_folder / self.index.shard_names[shard]
            descriptor = self._files[shard] = os.open(path, os.O_RDONLY)
        return descriptor

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)
