"""Batches of decoded images -> a shard of latents: the inner loop of `blackpoint data encode`.

What becomes of a batch depends on its samples alone, and a batch never reaches over two shards of
the output: shards can be written in any order, by any process. With buckets, the images of a batch
are encoded size by size and written in the order of the source: draws of training, which are
functions of a sample's number, are those of training on the images.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.caption_text import Captions, caption_members
from blackpoint.data.files.errors import UserError, disk_writes
from blackpoint.data.images.decode import BadImage
from blackpoint.data.images.luminance import luminance
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.data.latents import SIZES, to_bytes
from blackpoint.data.reader import Reader, View
from blackpoint.data.record import JSON, TEXT, ShardRecords
from blackpoint.data.shards.shard_digest import ShardContent
from blackpoint.data.shards.shard_file import ShardFile
from blackpoint.sampling.model import DiffusionModel


@dataclass
class Decoded:
    """A batch of the source: its usable samples, and the others."""

    keys: list[str] = field(default_factory=list)
    captions: list[Captions] = field(default_factory=list)
    pixels: list[tuple[list[int], Tensor]] = field(default_factory=list)
    """Of each size in turn: the rows that have it, and uint8 (rows, 3, H, W)."""
    sizes: list[PictureSize] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)


class SampleEncoder:
    """Encodes decoded batches and writes them as shards."""

    def __init__(
        self, model: DiffusionModel, dtype: torch.dtype, max_tokens: int | None = None
    ) -> None:
        self.model, self.dtype, self.max_tokens = model, dtype, max_tokens

    def write_shard(
        self, path: Path, batches: Iterable[Decoded]
    ) -> tuple[ShardRecords, ShardContent]:
        """Writes one shard and returns its records and contents.

        What has no finite latent becomes bad. Raises WriteFailed.
        """
        records = ShardRecords()
        with disk_writes():
            shard = ShardFile(path)
        try:
            for batch in batches:
                self._write_batch(batch, records, shard)
            with disk_writes():
                content = shard.close()
        finally:
            shard.abandon()
        return records, content

    def embed(self, captions: list[Captions]) -> list[dict[str, Tensor]]:
        """Returns the embeddings of each sample as they are stored, on the CPU.

        prompt_embeds (L, D), and of SDXL pooled (P,); of N captions (N, L, D) and (N, P). No more
        texts are encoded at once than there are samples.
        """
        texts = [text for several in captions for text in several]
        size = len(captions)
        chunks = [self._encode(texts[n : n + size]) for n in range(0, len(texts), size)]
        counts = [len(several) for several in captions]
        samples: list[dict[str, Tensor]] = [{} for _ in captions]
        for name in chunks[0]:
            parts = torch.cat([chunk[name] for chunk in chunks]).split(counts)
            for sample, part in zip(samples, parts, strict=True):
                sample[name] = part if len(part) > 1 else part[0]
        return samples

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self.model.encode_prompts(texts, max_tokens=self.max_tokens)
        names = [f"the caption {text!r:.60}" for text in texts]
        embeddings = {"prompt_embeds": self._stored(encoded.prompt_embeds, names)}
        if encoded.pooled is not None:
            embeddings["pooled"] = self._stored(encoded.pooled, names)
        return embeddings

    def _write_batch(self, batch: Decoded, records: ShardRecords, shard: ShardFile) -> None:
        if not batch.keys:
            return
        latents = self._latents(batch)
        embeddings = self.embed(batch.captions)
        for row, (key, captions) in enumerate(zip(batch.keys, batch.captions, strict=True)):
            usable, latent, pixels = latents[row]
            if not usable:
                batch.bad.append(BadSample(key, "the autoencoder gives no finite latent"))
                continue
            tensors = {"moments": latent, **embeddings[row]}
            if self.model.is_xl:
                tensors[SIZES] = torch.tensor(batch.sizes[row], dtype=torch.int32)
            with disk_writes():
                members = {"safetensors": to_bytes(tensors)} | caption_members(captions)
                content, caption = shard.write(key, members).values()
            height, width, _ = pixels.shape
            form = TEXT if len(captions) == 1 else JSON
            brightness = luminance(Image.fromarray(pixels))
            records.add(key, content, caption, width, height, brightness, form)

    def _latents(self, batch: Decoded) -> dict[int, tuple[bool, Tensor, np.ndarray]]:
        """Returns, by row, whether the moments are finite, the moments as stored, and the pixels
        (H, W, 3)."""
        latents: dict[int, tuple[bool, Tensor, np.ndarray]] = {}
        for rows, pixels in batch.pixels:
            moments = self.model.encode_moments(pixels.float() / 255)
            finite = moments.flatten(1).isfinite().all(dim=1).tolist()
            moments[~torch.tensor(finite)] = 0
            stored = self._stored(moments, [batch.keys[row] for row in rows])
            images = pixels.permute(0, 2, 3, 1).numpy()
            latents |= dict(zip(rows, zip(finite, stored, images, strict=True), strict=True))
        return latents

    def _stored(self, values: Tensor, names: list[str]) -> Tensor:
        """Returns the values in the stored format; raises UserError where it can't hold them."""
        result = values.to("cpu", self.dtype)
        beyond = ~result.flatten(1).isfinite().all(dim=1)
        if beyond.any():
            row = int(beyond.nonzero()[0])
            largest = values[row].abs().max().item()
            raise UserError(
                f"dtype={str(self.dtype).removeprefix('torch.')}: can't hold the values of "
                f"{names[row]}, up to {largest:.3g}; encode with dtype=bfloat16 or float32"
            )
        return result


class SourceBatches(IterableDataset):
    """Some of the source's samples in order, as batches."""

    def __init__(self, reader: Reader, batch_size: int, numbers: range) -> None:
        self.reader, self.batch_size, self.numbers = reader, batch_size, numbers

    def __iter__(self) -> Iterator[Decoded]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        size = self.batch_size
        for start in range(first * size, len(self.numbers), step * size):
            yield self._decode(self.numbers[start : start + size])

    def _decode(self, numbers: range) -> Decoded:
        batch, views = Decoded(), list[View]()
        for number in numbers:
            index = self.reader.sample_index(number)
            key = self.reader.index.key(index)
            try:
                view, captions = self.reader.read_all(0, index, training=False)
            except BadImage as reason:
                batch.bad.append(BadSample(key, str(reason)))
                continue
            views.append(view)
            batch.keys.append(key)
            batch.captions.append(captions)
        batch.sizes = [view.size for view in views]
        for shape in dict.fromkeys(view.pixels.shape for view in views):
            rows = [row for row, view in enumerate(views) if view.pixels.shape == shape]
            stacked = self.reader.stack([views[row] for row in rows])
            batch.pixels.append((rows, stacked["image"]))
        return batch
