"""The random draws of one training sample, as functions of (seed, epoch, sample index) alone.

A generator for each sample draws, in this order, the noise of the VAE posterior (models in pixel
space have none), t, eps and then what the options ask for: whether to train the last timestep
instead, the offset of each channel, the input's perturbation. So the draws depend neither on the
batch that the sample came in, nor on the number of processes, nor on whether the run was
interrupted; and an option that is off, or the choice between uniform and stratified t, leaves
posterior noise and eps as they were. Crop, flip, caption dropout and the choice among several
captions are drawn where the data are read, by data/transform.py, in streams of their own.

Stratified timesteps are a function of (seed, position) instead, the position being the sample's
place in the endless concatenation of epochs:

    t = floor(T frac(u + position phi)),   phi = (sqrt(5) - 1) / 2

Multiples of the golden ratio cut the circle into gaps of at most three lengths (the three-distance
theorem), so any run of consecutive positions, such as a global batch on any number of processes, is
spread evenly. Kingma et al. 2021 (VDM) spread the t of each batch to the same end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blackpoint.sampling.noise import derive_seed
from blackpoint.sampling.runtime.transfer import sent
from blackpoint.train.loss_config import LossConfig

# Fractions of the circle in fixed point: exact for positions that no floating point could hold.
BITS = 128
PHI = (math.isqrt(5 << 2 * BITS) - (1 << BITS)) >> 1


class Draws(NamedTuple):
    """Draws of a batch, made on the CPU; a tuple, whose parts a loader pins."""

    posterior_noise: Float[Tensor, "b c h w"] | None
    t: Int[Tensor, " b"]
    eps: Float[Tensor, "b c h w"]
    perturbation: Float[Tensor, "b c h w"] | None = None
    dropout_seeds: Int[Tensor, " b"] | None = None
    """What the masks of train/dropout.py are hashed from; None without dropout."""

    def to(self, device: torch.device) -> "Draws":
        """Returns them on `device`, for which the host does not wait."""
        return Draws(*(None if part is None else sent(part, device) for part in self))  # type: ignore[arg-type]

    def perturbed(self, eps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the noise that the network's input is made with; the target keeps `eps`.

        At t = T - 1 of a zero-SNR schedule the target is -x0 and an ideal answer depends on no
        noise, perturbed or not: unlike offset noise, a perturbation asks for nothing there that
        sampling, which starts from plain noise, does not.
        """
        return eps if self.perturbation is None else eps + self.perturbation


@dataclass(frozen=True)
class BatchDraws:
    """The draws of a run's training batches, of images or of moments, as a function of the batch.

    Plain numbers, so that the processes that read the data draw as well, ahead of the step.
    """

    seed: int
    num_timesteps: int
    loss: LossConfig
    channels: int
    """Channels of x0."""
    pixels_per_side: int
    """Pixels of an image per position of x0, along one side."""
    posterior: bool
    """Whether x0 is drawn from an autoencoder's posterior."""
    dropout: bool

    def __call__(self, batch: dict[str, Any]) -> Draws:
        """Returns the draws of the batch's samples in their epochs, on the CPU."""
        epochs, indices = batch["epoch"].tolist(), batch["index"].tolist()
        positions = batch["position"].tolist() if self.loss.timesteps == "stratified" else None
        size, loss = self.num_timesteps, self.loss
        draws = draw(
            self.seed, epochs, indices, self.shape(batch), size, positions, loss, self.posterior
        )
        if not self.dropout:
            return draws
        return draws._replace(dropout_seeds=dropout_seeds(self.seed, epochs, indices))

    def shape(self, batch: dict[str, Any]) -> tuple[int, ...]:
        """Returns the shape of one x0 for a batch of images or of moments."""
        name, pixels = ("moments", 1) if "moments" in batch else ("image", self.pixels_per_side)
        height, width = batch[name].shape[-2:]
        return self.channels, height // pixels, width // pixels


def draw(
    seed: int,
    epochs: Sequence[int],
    indices: Sequence[int],
    shape: Sequence[int],
    bound: int,
    positions: Sequence[int] | None = None,
    loss: LossConfig | None = None,
    posterior: bool = True,
) -> Draws:
    """Draws for samples `indices` in their `epochs`; latents of `shape` (C, H, W), t < bound.

    `positions` are needed where `loss.timesteps` is stratified; without `loss`, its defaults hold.
    `posterior`: whether x0 is drawn from a posterior, for which there is noise then.
    """
    loss = loss or LossConfig()
    sample_seeds = [
        derive_seed(seed, "train", epoch, index)
        for epoch, index in zip(epochs, indices, strict=True)
    ]
    timesteps = None
    if loss.timesteps == "stratified":
        assert positions is not None, "stratified timesteps need the samples' positions"
        timesteps = stratified_timesteps(seed, positions, bound)
    ranges = [(0, bound)] * len(sample_seeds)
    return _draw(sample_seeds, ranges, shape, loss, posterior, timesteps)


def dropout_seeds(seed: int, epochs: Sequence[int], indices: Sequence[int]) -> Int[Tensor, " b"]:
    """Returns what the dropout masks of samples `indices` in their `epochs` are hashed from."""
    samples = zip(epochs, indices, strict=True)
    return torch.tensor([derive_seed(seed, "dropout", epoch, index) for epoch, index in samples])


def draw_validation(
    seed: int,
    indices: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    shape: Sequence[int],
    posterior: bool = True,
) -> Draws:
    """Draws for validation samples, the same at every validation; t in ranges[i] = [low, high).

    No option of the loss changes them, so that validation losses compare between runs.
    """
    sample_seeds = [derive_seed(seed, "validation", index) for index in indices]
    return _draw(sample_seeds, ranges, shape, LossConfig(), posterior)


def stratified_timesteps(seed: int, positions: Sequence[int], num_timesteps: int) -> list[int]:
    """Returns floor(T frac(u_seed + position phi)) for each position, in exact integers."""
    start = derive_seed(seed, "timesteps") << (BITS - 63)
    circle = (1 << BITS) - 1
    return [
        ((start + position * PHI) & circle) * num_timesteps >> BITS
        for position in map(int, positions)
    ]


def _draw(
    sample_seeds: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    shape: Sequence[int],
    loss: LossConfig,
    posterior: bool,
    timesteps: Sequence[int] | None = None,
) -> Draws:
    posterior_noise = torch.empty(len(sample_seeds), *shape) if posterior else None
    t = torch.empty(len(sample_seeds), dtype=torch.long)
    eps = torch.empty(len(sample_seeds), *shape)
    perturbation = torch.empty_like(eps) if loss.input_perturbation else None
    generator = torch.Generator("cpu")
    for row, (sample_seed, (low, high)) in enumerate(zip(sample_seeds, ranges, strict=True)):
        generator.manual_seed(sample_seed)
        if posterior_noise is not None:
            torch.randn(tuple(shape), generator=generator, out=posterior_noise[row])
        t[row] = torch.randint(low, high, (), generator=generator)
        if timesteps is not None:
            t[row] = timesteps[row]
        torch.randn(tuple(shape), generator=generator, out=eps[row])
        if loss.terminal_share and torch.rand((), generator=generator) < loss.terminal_share:
            t[row] = high - 1
        if loss.offset_noise:
            eps[row] += loss.offset_noise * torch.randn((shape[0], 1, 1), generator=generator)
        if perturbation is not None:
            torch.randn(tuple(shape), generator=generator, out=perturbation[row])
            perturbation[row] *= loss.input_perturbation
    return Draws(posterior_noise, t, eps, perturbation)
