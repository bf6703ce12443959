"""Shards that training reads and the transforms of their images; free of torch and Lightning."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.data.mixture import MixtureEntry
from blackpoint.data.order.buckets import BucketsConfig, bucket_table
from blackpoint.data.shards.options import ShardOptions


@dataclass
class DataConfig(ShardOptions):
    """Shards and the transforms of their images."""

    SECTION: ClassVar[str] = "data."

    shards: PathText | None = field(default=MISSING, metadata={"unless": "mixture"})
    """Training shards, of images or of latents from `blackpoint data encode`: a folder, a pattern
    such as shards/shard-{000000..000009}.tar, or the same as a URL (https://, s3://, gs://). null
    where data.mixture is given."""
    mixture: dict[str, MixtureEntry] = field(default_factory=dict)
    """Instead of data.shards: several data sets by name, mixed by weight. Those that differ in
    data.image_key or data.caption_key are indexed beforehand, by `blackpoint data check`."""
    validation_shards: PathText | None = None
    """Validation shards, named in the same way; null: no validation."""
    validation_images: int = 256
    """Validation reads this many images, always the first ones."""
    resolution: int = 0
    """Side of the square images, in pixels; the shorter side is resized to it. With buckets: the
    side of the square whose area theirs is near to. 0: the size that the checkpoint was made for,
    or that of shards of latents."""
    buckets: BucketsConfig = field(default_factory=BucketsConfig)
    """Aspect-ratio buckets."""
    max_upscale: float | None = None
    """Images that would have to be enlarged by more than this are left out of training and
    validation, and listed; null: no limit. 1.0 enlarges none."""
    crop: Literal["auto", "random", "center"] = "auto"
    """Where the square, or the bucket's rectangle, is cut from the image; validation is always
    center. auto: random, or center for shards of latents, which hold one view of each image."""
    flip: bool = False
    """Mirrors half of the training images. Leave it off where left and right have meaning."""
    max_tokens: int | None = None
    """Tokens of a caption that are read, a multiple of what the text encoder reads at once (75 for
    SD and SDXL: 75, 150, 225), in chunks of so many; null: one chunk. Previews read as many; sample
    with the same."""
    caption_dropout: float = 0.1
    """Share of training captions replaced by "", which guidance needs, 0 to 1."""
    num_workers: int | None = None
    """Processes that decode images; 0 decodes in the training process. Not set: 4, or one for each
    core that the process may use where those are fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, self.SECTION, validation_images=">= 1", resolution=">= 0")
        check_ranges(self, self.SECTION, max_tokens=">= 1")
        check_ranges(self, self.SECTION, caption_dropout=">= 0 and <= 1", num_workers=">= 0")
        if self.max_upscale is not None and not self.max_upscale > 0:
            raise UserError(f"data.max_upscale={self.max_upscale}: must be above 0, or null")
        self._check_mixture()
        if self.buckets.enabled and self.resolution:
            bucket_table(self.buckets, self.resolution, self.max_upscale)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the mixture by name, in the order of the names, without those of 0."""
        weights = {name: self.mixture[name].weight for name in sorted(self.mixture)}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _check_mixture(self) -> None:
        if not self.mixture:
            if self.shards is None:
                raise UserError(
                    "data.shards=null: name the training shards, data.shards=FOLDER, or several "
                    "data sets, data.mixture.NAME.shards=FOLDER"
                )
            return
        names = ", ".join(sorted(self.mixture))
        if self.shards not in (None, MISSING):
            raise UserError(
                f"data.shards={self.shards} and data.mixture ({names}): training reads one or the "
                "other; set data.shards=null, or give that data set a name in data.mixture"
            )
        for name, entry in self.mixture.items():
            if not 0 <= entry.weight < math.inf:
                raise UserError(f"data.mixture.{name}.weight={entry.weight}: must be 0 or more")
        if not self.weights:
            raise UserError(f"data.mixture ({names}): every weight is 0; set one above 0")
