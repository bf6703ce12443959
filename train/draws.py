"""The random draws of one training sample, as functions of (seed, epoch, sample index) alone.

A generator for each sample draws, in this order, the noise of the VAE posterior, t, and eps. So
the draws depend neither on the batch that the sample came in, nor on the number of processes, nor
on whether the run was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.noise import derive_seed


@dataclass(frozen=True)
class Draws:
    """What a batch draws; all on the CPU."""

    posterior_noise: Float[Tensor, "b c h w"]
    t: Int[Tensor, " b"]
    eps: Float[Tensor, "b c h w"]


def draw(
    seed: int, epochs: Sequence[int], indices: Sequence[int], shape: Sequence[int], bound: int
) -> Draws:
    """Draws for samples `indices` in their `epochs`; latents of `shape` (C, H, W), t < bound."""
    sample_seeds = [
        derive_seed(seed, "train", epoch, index)
        for epoch, index in zip(epochs, indices, strict=True)
    ]
    ranges = [(0, bound)] * len(sample_seeds)
    return _draw(sample_seeds, ranges, shape)


def draw_validation(
    seed: int, indices: Sequence[int], ranges: Sequence[tuple[int, int]], shape: Sequence[int]
) -> Draws:
    """Draws for validation samples, the same at every validation; t in ranges[i] = [low, high)."""
    sample_seeds = [derive_seed(seed, "validation", index) for index in indices]
    return _draw(sample_seeds, ranges, shape)


def _draw(
    sample_seeds: Sequence[int], ranges: Sequence[tuple[int, int]], shape: Sequence[int]
) -> Draws:
    posterior_noise = torch.empty(len(sample_seeds), *shape)
    t = torch.empty(len(sample_seeds), dtype=torch.long)
    eps = torch.empty(len(sample_seeds), *shape)
    generator = torch.Generator("cpu")
    for row, (sample_seed, (low, high)) in enumerate(zip(sample_seeds, ranges, strict=True)):
        generator.manual_seed(sample_seed)
        torch.randn(tuple(shape), generator=generator, out=posterior_noise[row])
        t[row] = torch.randint(low, high, (), generator=generator)
        torch.randn(tuple(shape), generator=generator, out=eps[row])
    return Draws(posterior_noise, t, eps)
