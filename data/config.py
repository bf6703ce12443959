"""Which shards training reads, and what becomes of their images; free of torch and Lightning."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from data.decode import MAX_IMAGE_PIXELS
from data.errors import UserError
from data.shards import check_cache_fields


@dataclass
class DataConfig:
    """Shards and what becomes of their images."""

    shards: str = MISSING
    """Training shards, of images or of latents from `blackpoint data encode`: a folder, a pattern
    such as shards/shard-{000000..000009}.tar, or the same as a URL (https://, s3://, gs://)."""
    validation_shards: str | None = None
    """Validation shards, named in the same way; null: no validation."""
    validation_images: int = 256
    """Validation reads this many images, always the first ones."""
    resolution: int = 512
    """Side of the square images, in pixels; the shorter side is resized to it."""
    crop: Literal["auto", "random", "center"] = "auto"
    """Where the square is cut from the longer side; validation is always center. auto: random, or
    center for shards of latents, which hold one view of each image."""
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
    cache_dir: str | None = None
    """Folder where shards from URLs are kept, and indices that can't lie beside their shards; null:
    $XDG_CACHE_HOME/blackpoint or ~/.cache/blackpoint. Best on a local disk."""
    cache_gigabytes: float = 50.0
    """Shards from URLs are kept up to this size, in 10^9 bytes; of a larger data set each sample
    is read by a range request. 0: nothing is kept."""
    allow_shell_urls: bool = False
    """Lets pipe:COMMAND stand for a shard: the shell runs it, and its output is the shard."""

    def __post_init__(self) -> None:
        for name in ("resolution", "validation_images", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 1.")
        for name in ("caption_dropout", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be from 0 to 1.")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}: must be 0 or more.")
        check_cache_fields(self, "data.")
