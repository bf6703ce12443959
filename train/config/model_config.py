"""A pixel-space model that training makes, as its config says it; free of torch.

Levels are listed from the highest resolution to the lowest, each half the side of the one before.
Hoogeboom et al. 2023, section 3.3: down-sample early (`patch`), add blocks at the lowest level
alone (`blocks`), drop out only there (DropoutConfig); put transformer blocks into the low levels
for the U-ViT form (`transformer_blocks`).
"""

from dataclasses import dataclass, field
from typing import Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.choices import check_seed

Codec = Literal["space_to_depth", "wavelet"]
Condition = Literal["none", "class", "text"]


@dataclass
class ModelConfig:
    """The UNet or U-ViT that a run without `checkpoint` starts from."""

    channels: list[int] = field(default_factory=list)
    """Width of each level, highest resolution first; an empty list: the run needs a checkpoint."""
    blocks: list[int] = field(default_factory=list)
    """Residual blocks of each level on the way down; the way up has one more."""
    transformer_blocks: list[int] = field(default_factory=list)
    """Transformer blocks after each residual block of a level; the middle has the last level's
    number. [0, 0, 1] is a UNet with attention at the lowest of three levels, [0, 0, 12] with one
    residual block there a U-ViT."""
    head_channels: int = 64
    """Width of an attention head."""
    codec: Codec = "space_to_depth"
    """How pixels become channels: patches, or the 5/3 wavelet."""
    patch: int = 4
    """Early down-sampling: the first level has 1/patch of the image's side. A power of two."""
    condition: Condition = "text"
    """What the model is told: nothing, the class that each caption names, or the caption."""
    classes: list[str] = field(default_factory=list)
    """Class names, in the order of their labels; with condition=class every caption is one."""
    text_encoder: PathText | None = None
    """Folder, hub id or single .safetensors file of the pipeline whose CLIP text encoder and
    tokenizer condition=text uses; frozen, and saved with the model."""
    seed: int = 0
    """Decides the initial weights."""

    def __post_init__(self) -> None:
        if not self.channels:
            return
        num_levels = len(self.channels)
        for name in ("blocks", "transformer_blocks"):
            if len(getattr(self, name)) != num_levels:
                raise UserError(
                    f"model.{name}={getattr(self, name)}: must have one number for each of the "
                    f"{num_levels} levels of model.channels={self.channels}"
                )
        if min(self.channels) < 1 or min(self.blocks) < 1 or min(self.transformer_blocks) < 0:
            raise UserError(
                "model.channels and model.blocks must be at least 1 at every level, "
                "model.transformer_blocks at least 0"
            )
        check_ranges(self, "model.", head_channels=">= 1")
        check_seed("model.seed", self.seed)
        for width, depth in zip(self.channels, self.transformer_blocks, strict=True):
            if depth and width % self.head_channels:
                raise UserError(
                    f"model.head_channels={self.head_channels}: does not divide the width {width} "
                    "of a level with transformer blocks"
                )
        if self.patch < 1 or self.patch & (self.patch - 1):
            raise UserError(
                f"model.patch={self.patch}: must be a power of two; 1 is no early down-sampling"
            )
        if self.channels[0] < 3 * self.patch**2:
            raise UserError(
                f"model.channels={self.channels}: the first level is narrower than the "
                f"{3 * self.patch**2} channels of {self.patch} x {self.patch} pixels, which it "
                "must carry: the noise in them could not be told; widen it, or take a smaller "
                "model.patch"
            )
        self._check_condition()

    def _check_condition(self) -> None:
        if (self.condition == "class") != bool(self.classes):
            raise UserError(
                f"model.condition={self.condition} with {len(self.classes)} model.classes: classes "
                "belong to condition=class, which needs them"
            )
        if "" in self.classes or len(set(self.classes)) != len(self.classes):
            raise UserError("model.classes: names must differ, and none may be empty")
        if (self.condition == "text") != (self.text_encoder is not None):
            raise UserError(
                f"model.condition={self.condition} with model.text_encoder={self.text_encoder}: a "
                "text encoder belongs to condition=text, which needs one, such as the folder of a "
                "Stable Diffusion"
            )


@dataclass
class DropoutConfig:
    """Dropout in the low levels of the UNet, while it trains (Hoogeboom et al. 2023, 3.4)."""

    probability: float = 0.0
    """Share of activations that are dropped, such as .1."""
    max_resolution: int | None = None
    """Largest side of feature maps that have dropout, such as 16, for pictures of data.resolution
    squared; those of buckets have at most that area. Not set: every level."""

    def __post_init__(self) -> None:
        check_ranges(self, "dropout.", probability=">= 0 and < 1", max_resolution=">= 1")
