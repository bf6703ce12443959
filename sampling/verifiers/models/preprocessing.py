"""From images in [0, 1] to a vision model's input, as its own processor would, in torch.

    pixel_values = (crop(resize(image)) - mean) / std

A processor rounds to 8 bits after it resizes; here nothing is rounded, so that gradients flow, and
the two agree to 1.5 of 255 gray levels. That is checked on a probe when a processor is loaded; one
that does something else is used as it is, without gradients.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.verifier import Images

log = logging.getLogger(__name__)

INTERPOLATIONS = {
    0: InterpolationMode.NEAREST_EXACT,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}
"""PIL's numbers; the other filters (Lanczos, box, Hamming) have no gradient in torch."""
TOLERANCE_LEVELS = 1.5
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PROBE_SIZES = ((48, 64), (300, 260))


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalise, differentiably; None leaves a step out."""

    shortest_edge: int | None = None
    """Side in px that the shorter edge is resized to; the other keeps the proportions."""
    longest_edge: int | None = None
    """Side in px that the longer edge is resized to."""
    size: tuple[int, int] | None = None
    """Height and width in px to resize to, whatever the proportions."""
    interpolation: InterpolationMode = InterpolationMode.BICUBIC
    crop: tuple[int, int] | None = None
    """Height and width in px of the centre that is kept; a smaller image is padded with black."""
    crop_rounds: bool = False
    """Whether half a pixel of the crop's corner is rounded to even (torchvision), or down."""
    clamp: bool = True
    """Whether bicubic's overshoot is cut off, as 8 bits cut it off."""
    scale: float = 1.0
    """Factor of the values in [0, 1]."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    differentiable = True

    def __call__(self, images: Images) -> Float[Tensor, "n 3 h2 w2"]:
        pixels = images.float()
        height, width = self._target(*pixels.shape[-2:])
        # rows first: 8 bits cut off bicubic's overshoot after each direction
        for size in ((pixels.shape[-2], width), (height, width)):
            if size != tuple(pixels.shape[-2:]):
                pixels = tv.resize(pixels, list(size), self.interpolation, antialias=True)
                pixels = pixels.clamp(0, 1) if self.clamp else pixels
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop, self.crop_rounds)
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (pixels * self.scale - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width to resize to; an edge that follows is rounded down after
        the shortest, to nearest after the longest."""
        if self.size is not None:
            return self.size
        if self.shortest_edge is not None:
            edge, short = self.shortest_edge, min(height, width)
            return edge * height // short, edge * width // short
        if self.longest_edge is not None:
            scale = self.longest_edge / max(height, width)
            return round(height * scale), round(width * scale)
        return height, width


@dataclass(frozen=True)
class LibraryPreprocessing:
    """A processor of the library as it is: on 8-bit images, without gradients."""

    processor: Any

    differentiable = False

    def __call__(self, images: Images) -> Float[Tensor, "n 3 h2 w2"]:
        return processed(self.processor, images).to(images.device)


def processed(processor: Any, images: Images) -> Float[Tensor, "n 3 h2 w2"]:
    """Returns the output of the library's processor for the images, rounded to 8 bits."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return processor(images=list(pixels), return_tensors="pt").pixel_values


def load_preprocessing(folder: Path) -> Preprocessing | LibraryPreprocessing:
    """Reads preprocessor_config.json of a model's folder; raises UserError where there is none."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: its image processor cannot be loaded ({error}); preprocessor_config.json "
            "belongs beside config.json"
        ) from error
    ours = from_processor(processor)
    if ours is not None and _agrees(ours, processor):
        return ours
    log.warning("%s: %s is used as it is, without gradients", folder, type(processor).__name__)
    return LibraryPreprocessing(processor)


def from_processor(processor: Any) -> Preprocessing | None:
    """Returns the same steps in torch; None where the processor's fields name others."""
    shortest_edge = size = crop = None
    interpolation = INTERPOLATIONS.get(int(getattr(processor, "resample", None) or 0))
    if interpolation is None:
        return None
    if processor.do_resize:
        edges = _given(processor.size)
        if set(edges) == {"height", "width"}:
            size = (edges["height"], edges["width"])
        elif set(edges) == {"shortest_edge"}:
            shortest_edge = edges["shortest_edge"]
        else:
            return None
    if shortest_edge and getattr(processor, "crop_pct", None):  # ConvNeXt's way to say it
        side = shortest_edge
        small = side < 384
        shortest_edge = int(side / processor.crop_pct) if small else None
        size, crop = (None, (side, side)) if small else ((side, side), None)
    if getattr(processor, "do_center_crop", None):
        edges = _given(processor.crop_size)
        crop = (edges["height"], edges["width"])
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean = tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0)
    return Preprocessing(
        shortest_edge=shortest_edge,
        size=size,
        interpolation=interpolation,
        crop=crop,
        scale=scale,
        mean=mean,
        std=std,
    )


def _agrees(ours: Preprocessing, processor: Any) -> bool:
    """Whether both make the same of noise, wide and high, larger and smaller than the input."""
    tolerance = TOLERANCE_LEVELS / 255 * ours.scale / min(ours.std)
    for number, size in enumerate(PROBE_SIZES):
        probe = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(number))
        probe = (probe * 255).round() / 255
        expected, actual = processed(processor, probe), ours(probe)
        if actual.shape != expected.shape or (actual - expected).abs().max() > tolerance:
            return False
    return True


def _given(edges: Any) -> dict[str, int]:
    return {name: value for name, value in dict(edges).items() if value is not None}


def _center_crop(images: Images, size: tuple[int, int], rounds: bool) -> Images:
    """Keeps the centre, or pads around it with black, the odd pixel at the bottom and right."""
    for dim, want in ((-2, size[0]), (-1, size[1])):
        missing = want - images.shape[dim]
        if missing > 0:
            sides = (missing // 2, missing - missing // 2)
            images = F.pad(images, sides if dim == -1 else (0, 0, *sides))
        excess = images.shape[dim] - want
        images = images.narrow(dim, round(excess / 2) if rounds else excess // 2, want)
    return images
