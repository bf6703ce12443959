"""Inversion: from an image back to a noise that a deterministic DDIM run would make it of.

A DDIM step from t to the cleaner u (alpha a, deviation s; finite at zero terminal SNR) is

    F(z) = a_u x0(z, t) + s_u eps(z, t)

and its inverse at x_u the z with F(z) = x_u. With D the angle between the levels, sin D = s_t a_u -
a_t s_u, it is the fixed point of either of

    g(z) = (s_t / s_u) x_u - (sin D / s_u) x0(z, t)               the x0 form
    g(z) = (a_t / a_u) x_u + (sin D / a_u) eps(z, t)              the eps form

so the first is taken in the noisy half, s_u >= a_u, where it is finite also at zero terminal SNR,
and the second in the clean half. A network that predicts eps has an x0 that is divided by a_t, and
takes the second throughout.

g can be evaluated once at z = x_u (`ddim`: naive, with the model's time at the noisy end as in
diffusers, or at the clean end), iterated (`fixed_point`: AIDI, Pan et al. 2023), extrapolated from
the last iterates (`anderson`: Anderson 1965), or evaluated K times and averaged (`renoise`:
Garibi et al. 2024, without its noise correction). g contracts where (sin D / s_u) Lip(x0), or
(sin D / a_u) Lip(eps), is below 1; the ratio of successive changes tells whether it does.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.grid import Denoise, Prediction, SamplingGrid
from blackpoint.sampling.pipelines.painter import Levels

Method = Literal["ddim", "fixed_point", "anderson", "renoise"]
Latents = Float[Tensor, "b c h w"]
SMALLEST = 1e-12
MEMORY = 2
"""anderson: iterates that a new one is extrapolated from, beside the last."""
NUM_AVERAGED = 3
"""renoise: the last predictions that are averaged, or all where there are fewer."""


@dataclass(frozen=True)
class Inverter:
    """How a step is inverted."""

    method: Method = "fixed_point"
    num_iterations: int = 5
    """Evaluations per step, K; ddim has one."""
    model_time: Literal["noisy", "clean"] = "noisy"
    """ddim: the timestep that the network is asked at, t (as diffusers does) or u."""
    predicts_eps: bool = False
    """Whether the network predicts eps, so that the eps form is taken throughout."""

    def of(self, process: Levels) -> "Inverter":
        """Returns the inverter for a model's process."""
        return replace(self, predicts_eps=process.prediction_type == "epsilon")

    @property
    def evaluations(self) -> int:
        """Network evaluations per step and sample."""
        return 1 if self.method == "ddim" else self.num_iterations


@dataclass(frozen=True)
class Inversion:
    """Where an inversion arrived, and how well each step went."""

    x: Latents
    residual: Float[Tensor, "steps b"]
    """|z_K - z_(K-1)| / |z_K| of each step, the first inverted (the cleanest) first."""
    contraction: Float[Tensor, "steps b"]
    """Geometric mean of the ratios of successive changes; NaN with fewer than two changes."""


def invert(
    denoise: Denoise,
    grid: SamplingGrid,
    x: Latents,
    inverter: Inverter,
    start: int | None = None,
    changes_have_gradients: bool = True,
) -> Inversion:
    """Walks from level `start` (None: clean data) up to the noise.

    Without gradients of residual and contraction, a gradient of x keeps less memory per step.
    """
    start = grid.num_steps if start is None else start
    if not 0 < start <= grid.num_steps:
        raise ValueError(f"cannot invert from level {start} of {grid.num_steps}")
    residuals, contractions = [], []
    for step in reversed(range(start)):
        iterates = _iterate(denoise, grid, step, x, inverter)
        x = iterates[-1]
        if not changes_have_gradients:
            iterates = [iterate.detach() for iterate in iterates]
        changes = [_norm(b - a) for a, b in zip(iterates, iterates[1:], strict=False)]
        residuals.append(changes[-1] / _norm(iterates[-1]).clamp(min=SMALLEST))
        contractions.append(_contraction(changes))
    return Inversion(x, torch.stack(residuals), torch.stack(contractions))


def _iterate(
    denoise: Denoise, grid: SamplingGrid, step: int, x_u: Tensor, inverter: Inverter
) -> list[Tensor]:
    """Returns the iterates of z with F(z) = x_u, from z = x_u on."""
    t = grid.timesteps[step]
    if inverter.method == "ddim":
        if inverter.model_time == "clean" and step + 1 < grid.num_steps:
            t = grid.timesteps[step + 1]
        return [x_u, _fixed_point_map(denoise(x_u, t), grid, step, x_u, inverter)]
    iterates, images, readings = [x_u], [], []
    for _ in range(inverter.num_iterations):
        reading = denoise(iterates[-1], t)
        images.append(_fixed_point_map(reading, grid, step, x_u, inverter))
        readings.append(reading)
        if inverter.method == "anderson":
            iterates.append(_anderson(iterates, images))
        else:
            iterates.append(images[-1])
    if inverter.method == "renoise":
        kept = readings[-NUM_AVERAGED:]
        mean = Prediction(*(torch.stack(parts).mean(dim=0) for parts in zip(*kept, strict=True)))
        iterates[-1] = _fixed_point_map(mean, grid, step, x_u, inverter)
    return iterates


def _fixed_point_map(
    reading: Prediction, grid: SamplingGrid, step: int, x_u: Tensor, inverter: Inverter
) -> Tensor:
    """Returns g(z), from the reading of z at t."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(step), grid.level(step + 1)
    sine = sigma_t * alpha_u - alpha_t * sigma_u
    if sigma_u >= alpha_u and not inverter.predicts_eps:
        return (sigma_t / sigma_u) * x_u - (sine / sigma_u) * reading.x0
    return (alpha_t / alpha_u) * x_u + (sine / alpha_u) * reading.eps


def _anderson(iterates: list[Tensor], images: list[Tensor]) -> Tensor:
    """Returns the combination of the last images whose combined residual is least, by sample.

    Residuals are f_i = g(z_i) - z_i; with differences D of the last ones, gamma solves
    min |f_k - D gamma| and z = g(z_k) - dG gamma (Walker and Ni 2011, equation 2.2).
    """
    count = min(MEMORY, len(images) - 1)
    if count == 0:
        return images[-1]
    shape, rows = images[-1].shape, slice(-count - 1, None)
    g = torch.stack(images[rows], dim=-1).flatten(1, -2)  # (b, d, count + 1)
    f = g - torch.stack(iterates[rows], dim=-1).flatten(1, -2)
    df, dg = f.diff(dim=-1), g.diff(dim=-1)
    gram = df.mT @ df
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    ridge = torch.finfo(g.dtype).eps * scale.clamp(min=SMALLEST) * torch.eye(count).to(g)
    gamma = torch.linalg.solve(gram + ridge, df.mT @ f[..., -1:])
    return (g[..., -1:] - dg @ gamma)[..., 0].view(shape)


def _contraction(changes: list[Tensor]) -> Tensor:
    if len(changes) < 2:
        return torch.full_like(changes[0], torch.nan)
    ratio = changes[-1] / changes[0].clamp(min=SMALLEST)
    return ratio ** (1 / (len(changes) - 1))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
