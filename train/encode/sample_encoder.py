"""Batches of decoded images -> a shard of latents: the inner loop of `blackpoint data encode`.

What becomes of a batch depends on its samples alone, and a batch never reaches over two shards of
the output: shards can be written in any order, by any process.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.caption_text import Captions, caption_members
from blackpoint.data.files.errors import UserError, disk_writes
from blackpoint.data.images.decode import BadImage
from blackpoint.data.images.luminance import luminance
from blackpoint.data.latents import to_bytes
from blackpoint.data.reader import Reader
from blackpoint.data.record import JSON, TEXT, ShardRecords
from blackpoint.data.shards.shard_digest import ShardContent
from blackpoint.data.shards.shard_file import ShardFile
from blackpoint.sampling.model import DiffusionModel


@dataclass
class Decoded:
    """A batch of the source: pixels uint8 (B, 3, H, W) of the usable samples, None without any."""

    keys: list[str] = field(default_factory=list)
    captions: list[Captions] = field(default_factory=list)
    pixels: Tensor | None = None
    bad: list[BadSample] = field(default_factory=list)


class SampleEncoder:
    """Encodes decoded batches and writes them as shards."""

    def __init__(self, model: DiffusionModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

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

    def embed(self, captions: list[str]) -> Tensor:
        """Returns prompt embeddings (N, L, D) as they are stored, on the CPU."""
        embeds = self.model.encode_prompts(captions).prompt_embeds
        return self._stored(embeds, [f"the caption {caption!r:.60}" for caption in captions])

    def _write_batch(self, batch: Decoded, records: ShardRecords, shard: ShardFile) -> None:
        if batch.pixels is None:
            return
        moments = self.model.encode_moments(batch.pixels.float() / 255)
        finite = moments.flatten(1).isfinite().all(dim=1).tolist()
        moments[~torch.tensor(finite)] = 0
        rows = zip(
            finite,
            batch.keys,
            batch.captions,
            batch.pixels.permute(0, 2, 3, 1).numpy(),
            self._stored(moments, batch.keys),
            self._embed_all(batch.captions),
            strict=True,
        )
        for usable, key, captions, pixels, latent, embeds in rows:
            if not usable:
                batch.bad.append(BadSample(key, "the autoencoder gives no finite latent"))
                continue
            with disk_writes():
                members = {"safetensors": to_bytes(latent, embeds)} | caption_members(captions)
                latents, caption = shard.write(key, members).values()
            height, width, _ = pixels.shape
            form = TEXT if len(captions) == 1 else JSON
            brightness = luminance(Image.fromarray(pixels))
            records.add(key, latents, caption, width, height, brightness, form)

    def _embed_all(self, captions: list[Captions]) -> list[Tensor]:
        """Returns (L, D) for each sample with one caption, (N, L, D) for each with N.

        No more texts are encoded at once than there are samples.
        """
        texts = [text for several in captions for text in several]
        size = len(captions)
        rows = [self.embed(texts[n : n + size]) for n in range(0, len(texts), size)]
        parts = torch.cat(rows).split([len(several) for several in captions])
        return [part if len(part) > 1 else part[0] for part in parts]

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
        batch, contents = Decoded(), []
        for number in numbers:
            index = self.reader.sample_index(number)
            key = self.reader.index.key(index)
            try:
                pixels, captions = self.reader.read_all(0, index, training=False)
            except BadImage as reason:
                batch.bad.append(BadSample(key, str(reason)))
                continue
            contents.append(pixels)
            batch.keys.append(key)
            batch.captions.append(captions)
        batch.pixels = self.reader.stack(contents)["image"] if contents else None
        return batch
