"""The LightningDataModule: captioned images from shards, endless for training.

A batch is {"image": uint8 (B, 3, H, W), "caption": list of str ("" where dropped), "key": list of
str, "epoch": int64 (B,), "index": int64 (B,)}: which sample of the index, in which pass. All that
is random about a sample is a function of (seed, epoch, index).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import MISSING
from torch.utils.data import DataLoader, IterableDataset

from data.bad_samples import BadSample, refusal, too_many
from data.batches import TrainingBatches, ValidationBatches, slice_size
from data.decode import MAX_IMAGE_PIXELS
from data.errors import UserError
from data.index import Index, build_index, has_index
from data.reader import Reader
from data.shards import find_shards

# Lightning reminds us to share the batches out among the workers; data/batches.py does.
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")


@dataclass
class DataConfig:
    """Shards and what becomes of their images."""

    shards: str = MISSING
    """Training shards: a folder, or a pattern such as shards/shard-{000000..000009}.tar."""
    validation_shards: str | None = None
    """Validation shards, named in the same way; null: no validation."""
    validation_images: int = 256
    """Validation reads this many images, always the first ones."""
    resolution: int = 512
    """Side of the square images, in pixels; the shorter side is resized to it."""
    crop: Literal["random", "center"] = "random"
    """Where the square is cut from the longer side; validation is always center."""
    flip: bool = False
    """Mirrors half of the training images. Leave it off where left and right have meaning."""
    caption_dropout: float = 0.1
    """Share of training captions replaced by "", which guidance needs, 0 to 1."""
    num_workers: int = 4
    """Processes that decode images; 0 decodes in the training process."""
    max_bad_share: float = 0.01
    """Share of samples that may prove unusable before the run stops, 0 to 1."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Images with more pixels are refused as decompression bombs."""

    def __post_init__(self) -> None:
        for name in ("resolution", "validation_images", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 1.")
        for name in ("caption_dropout", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be from 0 to 1.")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: must be 0 or more.")


class CaptionedImages(LightningDataModule):
    """Training and validation batches of captioned images.

    `batch_size` counts the images of all processes. Training starts at sample `start_sample`; by
    default where the trainer stands: global_step * accumulate_grad_batches * batch_size.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        batch_size: int,
        start_sample: int | Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise UserError(f"seed={seed}: must be 0 or more.")
        self.config = config
        self.seed = seed
        self.batch_size = batch_size
        self.start_sample = start_sample
        self.bad_samples: dict[int, BadSample] = {}
        """Training samples that proved unusable, by index: read but replaced."""
        self._training: Reader | None = None
        self._validation: Reader | None = None

    def prepare_data(self) -> None:
        """Indexes shards that were made elsewhere; one process a machine does it."""
        for pattern, field in self._patterns():
            folder = find_shards(pattern, field)[0].parent
            if not has_index(folder):
                rank_zero_info(f"{field}={pattern} has no index: building {folder}/index, once.")
                limit, pixels = self.config.max_bad_share, self.config.max_image_pixels
                bad = build_index(folder, limit, pixels)
                rank_zero_info(f"Left out {len(bad)} samples: {folder}/index/bad_samples.jsonl")

    def setup(self, stage: str) -> None:
        """Opens the shards that `stage` needs."""
        slice_size(self.batch_size, self._world_size)
        readers = [self._reader(pattern, field) for pattern, field in self._patterns()]
        self._training = readers[0]
        self._validation = readers[1] if len(readers) > 1 else None

    def train_dataloader(self) -> DataLoader:
        """Returns the endless loader, from the position where training stands."""
        if self._training is None:
            self.setup("fit")
        assert self._training is not None
        batches = TrainingBatches(
            self._training, self.batch_size, self._start(), self._rank, self._world_size
        )
        return self._loader(batches, self.config.num_workers)

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
        return self._loader(batches, min(self.config.num_workers, len(batches), 2))

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
                warnings.warn(f"sample {sample.key} replaced: {sample.reason}", stacklevel=2)
            elif not training:
                warnings.warn(f"validation: {sample.key} replaced: {sample.reason}", stacklevel=2)
        num_bad, limit = len(self.bad_samples), self.config.max_bad_share
        num_samples = len(self._training) if self._training is not None else 0
        if self._training is not None and too_many(num_bad, num_samples, limit):
            bad = list(self.bad_samples.values())
            where = f"data.shards={self.config.shards}"
            raise refusal(where, bad, num_samples, limit, "data.max_bad_share")

    def _patterns(self) -> list[tuple[str, str]]:
        patterns = [(self.config.shards, "data.shards")]
        if self.config.validation_shards:
            patterns.append((self.config.validation_shards, "data.validation_shards"))
        return patterns

    def _reader(self, pattern: str, field: str) -> Reader:
        shards = find_shards(pattern, field)
        config = self.config
        return Reader(
            Index(shards[0].parent),
            shards,
            self.seed,
            config.resolution,
            config.crop,
            config.flip,
            config.caption_dropout,
            config.max_image_pixels,
        )

    def _start(self) -> int:
        if callable(self.start_sample):
            return self.start_sample()
        if self.start_sample is not None:
            return self.start_sample
        if self.trainer is None:
            return 0
        return self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size

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
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _as_it_is(batch: Any) -> Any:
    return batch
