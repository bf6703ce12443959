"""Dropout whose masks are functions of (sample, layer, position), at the low levels of a UNet.

    keep[i] = hash(seed of the sample, layer, i) >= p,   y = x keep / (1 - p)

torch's own draws from a stream that depends on the batch and on all that came before: a resumed
run, or one on other processes, would drop other activations. The hash is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014) in the integers of the device, so no generator is needed and
a recomputed forward pass (gradient checkpointing) drops the same.
"""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Int
from torch import Tensor, nn

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.noise import derive_seed
from blackpoint.sampling.runtime.speed import blocks_by_level
from blackpoint.train.config.model_config import DropoutConfig

STEP = 0x9E3779B97F4A7C15 - 2**64  # of SplitMix64, as the signed integers of torch hold it
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def keep_mask(seeds: Int[Tensor, " b"], shape: Sequence[int], p: float) -> Bool[Tensor, "b ..."]:
    """Returns, for each sample, which of `shape` activations stay."""
    index = torch.arange(torch.Size(shape).numel(), device=seeds.device)
    bits = seeds[:, None] + index * STEP
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        bits = (bits ^ _shifted(bits, shift)) * multiplier
    bits = bits ^ _shifted(bits, 31)
    return ((bits & (2**32 - 1)) >= round(p * 2**32)).view(-1, *shape)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifts right and fills with zeros, where torch would repeat the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


class SampleSeeds:
    """The seeds of the batch that is in the network: set before each forward pass."""

    def __init__(self) -> None:
        self.of_batch: Tensor | None = None
        """(B,) int64, `Draws.dropout_seeds` of train/draws.py, on the device of the network."""


class SampleDropout(nn.Module):
    """Stands in for one nn.Dropout, of number or name `layer`; does nothing in evaluation mode."""

    def __init__(self, p: float, layer: int | str, seeds: SampleSeeds) -> None:
        super().__init__()
        # Hashed here: torch.compile cannot trace the hash, and would cut its graph at every layer.
        self.p, self.salt, self.seeds = p, derive_seed("layer", layer), seeds

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.seeds.of_batch is not None and len(self.seeds.of_batch) == len(x)
        seeds = self.seeds.of_batch ^ self.salt
        return x * keep_mask(seeds, x.shape[1:], self.p) / (1 - self.p)


def dropout_levels(unet: UNet2DConditionModel, config: DropoutConfig, side: int) -> list[int]:
    """Returns the levels that the config means, 0 being the input's, which is `side` wide where it
    is square; rectangles of about its area have dropout at the same levels.

    Raises UserError where no level has feature maps of max_resolution.
    """
    sides = [side >> level for level in range(len(unet.down_blocks))]
    largest = sides[0] if config.max_resolution is None else config.max_resolution
    if largest not in sides:
        raise UserError(
            f"dropout.max_resolution={largest}: no level of this UNet has feature maps of that "
            f"side; theirs are {', '.join(map(str, sides))}"
        )
    return [level for level, width in enumerate(sides) if width <= largest]


def add_dropout(
    unet: UNet2DConditionModel, config: DropoutConfig, side: int, seeds: SampleSeeds
) -> None:
    """Puts dropout into the levels that the config means, and the middle, if it wants any."""
    if not config.probability:
        return
    chosen = dropout_levels(unet, config, side)
    layers = [
        (level, parent, name)
        for level, block in blocks_by_level(unet)
        for parent in block.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout)
    ]
    for layer, (level, parent, name) in enumerate(layers):
        if level in chosen:
            new = SampleDropout(config.probability, layer, seeds).train(parent.training)
            parent.register_module(name, new)
