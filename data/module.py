"""The LightningDataModule: captioned images, or their latents, from shards; endless for training.

A batch is {"image": uint8 (B, 3, H, W), "sizes": int64 (B, 6), rows of PictureSize, "caption": list
of str ("" where dropped), "key": list of str, "epoch", "index" and "position": int64 (B,)}: which
sample of the index, in which pass, and its place in all passes laid end to end (in validation, its
number). With buckets, H and W differ from batch to batch; in a mixture, indices count through its
data sets. Encoded shards give, instead of the image, "moments" (B, 2C, H/f, W/f) and
"prompt_embeds" (B, L, D), float32, and "pooled" (B, P) and "sizes" of SDXL alone. All that is
random about a sample is a function of (seed, epoch, index).
"""

import itertools
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset

from blackpoint.data.bad_samples import NUM_LISTED, BadSample, refusal, too_many
from blackpoint.data.batches import Draw, TrainingBatches, ValidationBatches, slice_size
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.notes import first
from blackpoint.data.files.signals import leave_signals_to_parent
from blackpoint.data.identity import identity
from blackpoint.data.images.picture_size import READER_VERSION
from blackpoint.data.index.index import INDEX_FOLDER, Index, has_index
from blackpoint.data.index.shard_set import ShardSet, index_shards, indexing_command, open_shards
from blackpoint.data.index.verify import verify
from blackpoint.data.latent_options import check_options
from blackpoint.data.latents import Encoding, LatentReader
from blackpoint.data.mixed_reader import MixedReader, check_alike
from blackpoint.data.order.buckets import Size, bucket_table, square
from blackpoint.data.order.order import BucketOrder
from blackpoint.data.order.sorted_samples import sorted_samples
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import is_encoded
from blackpoint.data.summary import bucket_rows, summary_lines
from blackpoint.data.work.workers import loader_workers

VALIDATION = "data.validation_shards"

# Lightning reminds us to share the batches out among the workers; data/batches.py does.
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")


class CaptionedImages(LightningDataModule):
    """Training and validation batches of captioned images.

    `batch_size` counts the images of all processes. Training starts at sample `start_sample`; by
    default where the trainer stands: global_step * accumulate_grad_batches * batch_size. `decoder`:
    data/images/decode.py.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        batch_size: int,
        start_sample: int | None = None,
        decoder: int = READER_VERSION,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise UserError(f"seed={seed}: must be 0 or more")
        self.config = config
        self.seed = seed
        self.batch_size = batch_size
        self.start_sample = start_sample
        self.decoder = decoder
        self.bad_samples: dict[int, BadSample] = {}
        """Training samples that proved unusable, by index: read but replaced."""
        self.draw: Draw | None = None
        """What training batches have as "draws", made where they are read."""
        self._is_prepared = False
        self._readers: dict[str, Reader] = {}
        self._training: Reader | MixedReader | None = None
        self._validation: Reader | None = None

    def prepare_data(self) -> None:
        """Indexes shards made elsewhere, compares others with their index and sorts samples by
        bucket; one process per machine does. Raises UserError for shards that have changed."""
        if self._is_prepared:  # by the run, before Lightning asks for it
            return
        for pattern, field, _ in self._data_sets():
            shards = self._shards(pattern, field)
            if not has_index(shards.folder):
                rank_zero_info(f"{field}={pattern} has no index: building it, once.")
                folder, bad = index_shards(shards, self.config)
                rank_zero_info(f"Left out {len(bad)} samples: {folder}/index/bad_samples.jsonl")
                shards = open_shards(pattern, field, self.config)
            for note in [*shards.notes, *verify(shards)]:
                print(f"note: {note}", file=sys.stderr, flush=True)
            if self.config.buckets.enabled or self.config.max_upscale is not None:
                self._reader(pattern, field, "", 0)  # sorts the samples into a file
        self._is_prepared = True

    def require_index(self, num_processes: int) -> None:
        """Raises UserError for shards without an index, which one of several processes would make.

        The others would meanwhile wait for it at their rendezvous, and give up.
        """
        for pattern, field, _ in self._data_sets() if num_processes > 1 else []:
            shards = self._shards(pattern, field)
            if not has_index(shards.folder):
                raise UserError(
                    f"{field}={pattern}: has no index, and {num_processes} processes that were "
                    "started at once would wait for the one that makes it; make it first: "
                    f"{indexing_command(shards, pattern, self.config)}"
                )

    def setup(self, stage: str) -> None:
        """Opens the shards that `stage` needs."""
        slice_size(self.batch_size, self._world_size)
        offset, weights = 0, self.config.weights
        self._readers = {}
        for pattern, field, name in self._data_sets():
            reader = self._reader(pattern, field, name, offset if name else 0)
            self._readers[f"{field}={pattern}"] = reader
            offset += len(reader.index)
        self._validation = self._readers.get(f"{VALIDATION}={self.config.validation_shards}")
        training = dict(itertools.islice(self._readers.items(), len(weights) or 1))
        self._training, *_ = training.values()
        if weights:
            check_alike(training)
            run_length = self.batch_size if self.config.buckets.enabled else 1
            self._training = MixedReader([*training.values()], [*weights.values()], run_length)

    def train_dataloader(self) -> DataLoader:
        """Returns the endless loader, from the position where training stands."""
        if self._training is None:
            self.setup("fit")
        assert self._training is not None
        batches = TrainingBatches(
            self._training,
            self.batch_size,
            self._start(),
            self._rank,
            self._world_size,
            self.draw,
        )
        return self._loader(batches, self._num_workers)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Returns the loader of the fixed validation samples; none without validation shards."""
        if self._training is None:
            self.setup("validate")
        if self._validation is None:
            return []
        batches = ValidationBatches(
            self._validation,
            self.config.validation_images,
            self.batch_size,
            self._rank,
            self._world_size,
        )
        if not len(batches):
            rank_zero_info(
                f"note: {VALIDATION}={self.config.validation_shards}: fewer images than "
                f"{self._world_size} processes: there is no validation"
            )
        return self._loader(batches, min(self._num_workers, len(batches), 2))

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Any:
        """Counts and names the samples that were replaced; stops above the share."""
        replaced = batch.pop("replaced", [])
        if replaced:
            self.account(replaced, training=self.trainer is None or self.trainer.training)
        return batch

    def account(self, replaced: list[tuple[int, BadSample]], training: bool = True) -> None:
        """Records replaced samples, each once; raises UserError above the share."""
        for index, sample in replaced:
            if training and index not in self.bad_samples:
                self.bad_samples[index] = sample
                if first("samples replaced", NUM_LISTED):
                    warnings.warn(f"sample {sample.key} replaced: {sample.reason}", stacklevel=2)
            elif not training and first("validation samples replaced", NUM_LISTED):
                warnings.warn(f"validation: {sample.key} replaced: {sample.reason}", stacklevel=2)
        num_bad, limit = len(self.bad_samples), self.config.max_bad_share
        num_samples = len(self._training) if self._training is not None else 0
        if self._training is not None and too_many(num_bad, num_samples, limit):
            bad = list(self.bad_samples.values())
            config = self.config
            where = "data.mixture" if config.mixture else f"data.shards={config.shards}"
            raise refusal(where, bad, num_samples, limit, "data.max_bad_share")

    def encodings(self) -> list[tuple[str, Encoding | None]]:
        """Returns "field=value" and the Encoding, None for images, of each data set."""
        encodings: list[tuple[str, Encoding | None]] = []
        for pattern, field, _ in self._data_sets():
            folder = open_shards(pattern, field, self.config).folder
            encoding = Encoding.read(folder) if is_encoded(folder) else None
            encodings.append((f"{field}={pattern}", encoding))
        return encodings

    def readers(self) -> dict[str, Reader]:
        """Returns the reader of each data set by "field=value", those of training first."""
        assert self._readers, "setup comes first"
        return self._readers

    def identity(self) -> dict[str, Any]:
        """Returns the identity of the data, by field: data/identity.py."""
        return {name.partition("=")[0]: identity(reader) for name, reader in self.readers().items()}

    @property
    def num_training_images(self) -> int:
        """Samples of an epoch, those of all data sets of a mixture."""
        assert self._training is not None, "setup comes first"
        return len(self._training)

    def summary(self) -> list[str]:
        """Returns lines for the user: data/summary.py."""
        mixed = self._training if isinstance(self._training, MixedReader) else None
        parts = mixed.schedule.parts if mixed else None
        return summary_lines(self.readers(), parts, self.batch_size)

    def sizes(self) -> list[Size]:
        """Returns every (width, height) that a batch may have, in pixels."""
        readers = self.readers()
        rows = {row[1:3] for row in bucket_rows(readers) if row.width}
        plain = any(reader.order is None for reader in readers.values())
        return sorted(rows | ({(self.config.resolution,) * 2} if plain else set()))

    def _shards(self, pattern: str, field: str) -> ShardSet:
        shards = open_shards(pattern, field, self.config)
        if is_encoded(shards.folder) and not has_index(shards.folder):
            raise UserError(
                f"{field}={pattern}: {shards.folder / INDEX_FOLDER} is missing, and shards of "
                "latents can't be indexed anew; encode the images again with `blackpoint data "
                "encode`"
            )
        return shards

    def _data_sets(self) -> list[tuple[str, str, str]]:
        """Returns (pattern, field, name in a mixture or "") of each, those of training first."""
        config = self.config
        data_sets = [(config.shards, "data.shards", "")] if config.shards else []
        for name in config.weights:
            data_sets.append((config.mixture[name].shards, f"data.mixture.{name}.shards", name))
        if config.validation_shards:
            data_sets.append((config.validation_shards, VALIDATION, ""))
        return data_sets

    def _reader(self, pattern: str, field: str, name: str, offset: int) -> Reader:
        shards, config = open_shards(pattern, field, self.config), self.config
        kind = LatentReader if is_encoded(shards.folder) else Reader
        reader = kind(
            Index(shards.folder, shards.kept),
            shards.paths,
            self.seed,
            config.resolution,
            "random" if config.crop == "auto" else config.crop,
            config.flip,
            config.caption_dropout,
            config.max_image_pixels,
            remote=shards.remote,
            name=name,
            offset=offset,
            decoder=self.decoder,
        )
        if isinstance(reader, LatentReader):
            check_options(f"{field}={pattern}", reader.encoding, config, field != VALIDATION)
        reader.order = self._order(reader, f"{field}={pattern}")
        return reader

    def _order(self, reader: Reader, where: str) -> BucketOrder | None:
        """Returns the order of buckets, or of what is left once images that are too small are."""
        config = self.config
        if config.buckets.enabled:
            buckets = bucket_table(config.buckets, config.resolution, config.max_upscale)
            batch_size = self.batch_size
        elif config.max_upscale is not None:
            buckets, batch_size = square(config.resolution, config.max_upscale), 1
        else:
            return None
        samples = sorted_samples(reader.index, reader.chosen, buckets, config.cache_dir)
        if not any(samples.counts):
            raise UserError(
                f"{where}: all of {len(reader)} images would have to be enlarged by more than "
                f"data.max_upscale={config.max_upscale:g} for data.resolution={config.resolution}; "
                "raise data.max_upscale or lower data.resolution"
            )
        stream = f"/{reader.name}" if reader.name else ""
        return BucketOrder(samples, self.seed, batch_size, stream)

    def _start(self) -> int:
        start, trainer = self.start_sample or 0, self.trainer
        if self.start_sample is None and trainer is not None:
            start = trainer.global_step * trainer.accumulate_grad_batches * self.batch_size
        if self.config.buckets.enabled and start % self.batch_size:
            raise UserError(
                f"start_sample={start}: batches of one bucket begin at multiples of "
                f"batch_size={self.batch_size}"
            )
        return start

    @property
    def _num_workers(self) -> int:
        here = self.trainer.num_devices if self.trainer else 1
        return loader_workers(self.config.num_workers, here)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @staticmethod
    def _loader(batches: IterableDataset, num_workers: int) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,  # The data set yields whole batches.
            collate_fn=_as_it_is,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_parent(),
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _as_it_is(batch: Any) -> Any:
    return batch
