"""Aspect-ratio buckets: which sizes images are cut to, and which of them each image is cut to.

Sides are multiples of `step_px`. For every side from `min_side_px` to `max_side_px`, as the width
and as the height, there is the bucket whose other side is the largest multiple with

    width * height <= resolution^2,

itself within the limits, as in NovelAI's and kohya's trainers. An image of aspect a in a bucket of
aspect A is scaled to cover it and keeps the share min(a / A, A / a); it goes where it keeps most,
at a tie to the larger bucket, then to the narrower one.
"""

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges

Size = tuple[int, int]  # width, height, in pixels


@dataclass
class BucketsConfig:
    """Batches of images of like aspect, cut to rectangles of about resolution^2 pixels."""

    SECTION: ClassVar[str] = "data."

    enabled: bool = False
    """Cut images to the rectangle that loses least of them, not to a square; every batch is of one
    size. Latents are encoded in the buckets that training takes."""
    step_px: int = 64
    """Sides are multiples of this; the UNet of Stable Diffusion asks for multiples of 64."""
    min_side_px: int | None = None
    """Shortest side of a bucket; null: half of data.resolution."""
    max_side_px: int | None = None
    """Longest side of a bucket; null: twice data.resolution."""
    max_aspect: float | None = None
    """Longest side over shortest of any bucket, such as 2.0; null: what the sides allow, 4."""

    def __post_init__(self) -> None:
        limits = {"step_px": ">= 1", "min_side_px": ">= 1", "max_side_px": ">= 1"}
        check_ranges(self, f"{self.SECTION}buckets.", **limits, max_aspect=">= 1")

    def record(self) -> dict[str, Any] | None:
        """Returns what decides the sizes, for json; None for squares."""
        settings = asdict(self)
        return settings if settings.pop("enabled") else None


@dataclass(frozen=True)
class Buckets:
    """The sizes, and how far an image may be enlarged; hashable, equal where the cut is equal."""

    sizes: tuple[Size, ...]
    """Larger ones first, then narrower ones: the first of equally good ones is taken."""
    max_upscale: float | None = None

    def assign(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Returns each image's bucket, int64; len(sizes) where all ask for too much enlarging."""
        widths, heights = widths.astype(np.int64), heights.astype(np.int64)
        chosen = np.full(len(widths), len(self.sizes))
        most_kept = np.zeros(len(widths))
        for number, (width, height) in enumerate(self.sizes):
            across, along = width * heights, height * widths
            with np.errstate(invalid="ignore"):
                kept = np.minimum(across, along) / np.maximum(across, along)
            if self.max_upscale is not None:
                within_width = width <= self.max_upscale * widths
                kept = kept * (within_width & (height <= self.max_upscale * heights))
            better = kept > most_kept
            chosen[better] = number
            most_kept[better] = kept[better]
        return chosen

    def is_enlarged(
        self, widths: np.ndarray, heights: np.ndarray, numbers: np.ndarray
    ) -> np.ndarray:
        """Tells of each image whether it is enlarged to cover its bucket, bool."""
        sizes = np.array([*self.sizes, (0, 0)])[numbers]
        return (sizes[:, 0] > widths) | (sizes[:, 1] > heights)


@functools.lru_cache(maxsize=65536)
def bucket_of(buckets: Buckets, width: int, height: int) -> int:
    """Returns the bucket of one image, as `Buckets.assign` does."""
    return int(buckets.assign(np.array([width]), np.array([height]))[0])


def square(resolution: int, max_upscale: float | None) -> Buckets:
    """Returns the one bucket of the square crop."""
    return Buckets(((resolution, resolution),), max_upscale)


def bucket_table(config: BucketsConfig, resolution: int, max_upscale: float | None) -> Buckets:
    """Returns the buckets around `resolution`; raises UserError where there are none."""
    step, area = config.step_px, resolution**2
    shortest = config.min_side_px if config.min_side_px is not None else resolution / 2
    longest = config.max_side_px if config.max_side_px is not None else resolution * 2
    sizes = set()
    for side in range(math.ceil(shortest / step) * step, int(longest) + 1, step):
        other = min(area // side, int(longest)) // step * step
        aspect = max(side, other) / max(min(side, other), 1)
        if other >= shortest and (config.max_aspect is None or aspect <= config.max_aspect):
            sizes |= {(side, other), (other, side)}
    if not sizes:
        raise UserError(
            f"{config.SECTION}buckets: no multiples of step_px={step} from {shortest:g} to "
            f"{longest:g} px (min_side_px, max_side_px; max_aspect={config.max_aspect}) make a "
            f"rectangle of at most {config.SECTION}resolution={resolution} squared; lower step_px "
            "or widen the limits"
        )
    ordered = sorted(sizes, key=lambda size: (-size[0] * size[1], size))
    return Buckets(tuple(ordered), max_upscale)
