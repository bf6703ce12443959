"""`blackpoint data encode`: shards of images -> shards of latents and prompt embeddings.

    moments = [mean, log variance] of q(z | image),   z = scale (mean + exp(log variance / 2) noise)

What is stored is the posterior, not a draw from it: training draws its own noise at every visit, so
that it computes from the cache what it would compute from the images (data/latents.py has the
format). A cache holds one view of each image: center crop, not flipped.
"""

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.bad_samples import BadSample, refusal, too_many
from data.index import Index, IndexWriter, has_index
from data.latents import Encoding
from data.progress import progress
from data.reader import Reader
from data.shard_file import shard_name
from data.shard_set import index_shards, open_shards
from data.shards import is_encoded
from sampling.errors import RunFailed, UserError
from sampling.export import moved_into_place, require_empty
from sampling.fingerprint import text_encoder_digest, vae_digest
from sampling.model import DiffusionModel
from sampling.sample import find_device
from train.encode_config import EncodeConfig
from train.sample_encoder import Decoded, SampleEncoder, SourceBatches

NUM_BAD_BEFORE_STOP = 100


@dataclass
class EncodeResult:
    """What was encoded and what was not."""

    num_samples: int = 0
    num_shards: int = 0
    bad: list[BadSample] = field(default_factory=list)


def encode(config: EncodeConfig) -> EncodeResult:
    """Encodes `config.source` into `config.output`; what fails leaves nothing behind.

    Raises UserError for wrong input, such as too many bad samples, and RunFailed on a full disk.
    """
    output = Path(config.output)
    require_empty(output)
    reader = open_source(config)
    model = DiffusionModel.load(config.checkpoint, find_device(config.device), with_unet=False)
    model.latent_shape(config.resolution, config.resolution)
    model.load_encoders()
    try:
        with moved_into_place(output) as folder:
            return encode_into(folder, config, reader, model)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailed(
            f"output={output}: the disk is full; nothing was kept. Free some space, or name a "
            "folder on another disk."
        ) from None


def open_source(config: EncodeConfig) -> Reader:
    """Returns the reader of the source's images, indexed first where they were not."""
    shards = open_shards(config.source, "source", config, in_order=True)
    if is_encoded(shards.folder):
        raise UserError(f"source={config.source}: holds latents already. Name shards of images.")
    if not has_index(shards.folder):
        index_shards(shards, config.max_bad_share, config.max_image_pixels)
        shards = open_shards(config.source, "source", config, in_order=True)
    return Reader(
        Index(shards.folder),
        shards.paths,
        seed=0,
        resolution=config.resolution,
        crop="center",
        max_image_pixels=config.max_image_pixels,
        remote=shards.remote,
    )


def encode_into(
    folder: Path, config: EncodeConfig, reader: Reader, model: DiffusionModel
) -> EncodeResult:
    """Writes shards, index and encoding.json into `folder`."""
    encoder = SampleEncoder(model, getattr(torch, config.dtype))
    result = EncodeResult()
    batches = DataLoader(
        SourceBatches(reader, config.batch_size, config.samples_per_shard),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=config.num_workers,
    )
    shards = []
    with IndexWriter(folder) as index, progress("encoding", len(reader)) as advance:
        for number, of_shard in itertools.groupby(batches, key=lambda batch: batch.shard):
            shards.append(folder / shard_name(number))
            watched = _watched(of_shard, config, len(reader), result.bad, advance)
            index.append(number, encoder.write_shard(shards[-1], watched))
        if too_many(len(result.bad), len(reader), config.max_bad_share) or not index.num_samples:
            raise _refusal(config, len(reader), result.bad)
        index.close(shards, result.bad)
    empty = encoder.embed([""])[0]
    encoding_of(config, model, tuple(empty.shape)).write(folder, empty)
    result.num_samples, result.num_shards = index.num_samples, len(shards)
    return result


def encoding_of(
    config: EncodeConfig, model: DiffusionModel, prompt_embeds_shape: tuple[int, ...]
) -> Encoding:
    """Returns the record of what the encoders of `model` made of the source."""
    assert model.folder is not None
    _, height, width = model.latent_shape(config.resolution, config.resolution)
    return Encoding(
        source=config.source,
        checkpoint=config.checkpoint,
        vae=vae_digest(model.folder),
        text_encoder=text_encoder_digest(model.folder),
        resolution=config.resolution,
        crop=config.crop,
        dtype=config.dtype,
        moments_shape=(2 * int(model.vae.config.latent_channels), height, width),
        prompt_embeds_shape=prompt_embeds_shape,
        scaling_factor=model.scaling_factor,
        samples_per_shard=config.samples_per_shard,
    )


def _watched(
    batches: Iterable[Decoded],
    config: EncodeConfig,
    num_samples: int,
    bad: list[BadSample],
    advance: Callable[[], None],
) -> Iterator[Decoded]:
    """Passes batches on, and afterwards counts them and what was bad in them."""
    for batch in batches:
        count = len(batch.keys) + len(batch.bad)
        yield batch
        bad += batch.bad
        for _ in range(count):
            advance()
        # A source that is bad throughout is not read to its end to say so.
        if len(bad) >= NUM_BAD_BEFORE_STOP and too_many(
            len(bad), num_samples, config.max_bad_share
        ):
            raise _refusal(config, num_samples, bad)


def _refusal(config: EncodeConfig, num_samples: int, bad: list[BadSample]) -> Exception:
    return refusal(
        f"source={config.source}", bad, num_samples, config.max_bad_share, "max_bad_share"
    )


def _as_it_is(batch: Any) -> Any:
    return batch
