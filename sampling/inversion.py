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

`bdia` (Zhang et al. 2023) is a sampler of its own whose inverse is exact. It walks pairs: with y_s
the DDIM step from x_t to a level s,

    x_u = gamma (x_p - y_p) + y_u,     x_p = (x_u - y_u) / gamma + y_p,     p the noisier neighbour
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import Denoise, Prediction, SamplingGrid

Method = Literal["ddim", "fixed_point", "anderson", "renoise"]
METHODS = ("ddim", "fixed_point", "anderson", "renoise")
Latents = Float[Tensor, "b c h w"]
SMALLEST = 1e-12


@dataclass(frozen=True)
class Inverter:
    """How a step is inverted."""

    method: Method = "fixed_point"
    num_iterations: int = 5
    """Evaluations a step, K; ddim has one."""
    model_time: Literal["noisy", "clean"] = "noisy"
    """ddim: the timestep that the network is asked at, t (as diffusers does) or u."""
    memory: int = 2
    """anderson: iterates that a new one is extrapolated from, beside the last."""
    num_averaged: int = 3
    """renoise: the last predictions, of K, that are averaged."""
    predicts_eps: bool = False
    """Whether the network predicts eps, so that the eps form is taken throughout."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method={self.method} is not one of {', '.join(METHODS)}")
        for name in ("num_iterations", "memory", "num_averaged"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.method == "renoise" and self.num_averaged > self.num_iterations:
            raise UserError(
                f"num_averaged={self.num_averaged} is more than num_iterations="
                f"{self.num_iterations}; average at most all of them"
            )

    def of(self, process: Process) -> "Inverter":
        """Returns the inverter for a model's process."""
        return replace(self, predicts_eps=process.prediction_type == "epsilon")

    @property
    def evaluations(self) -> int:
        """Network evaluations a step and sample."""
        return 1 if self.method == "ddim" else self.num_iterations


@dataclass(frozen=True)
class Inversion:
    """Where an inversion arrived, and how well each step went."""

    x: Latents
    residual: Float[Tensor, "steps b"]
    """|z_K - z_(K-1)| / |z_K| of each step, the first inverted (the cleanest) first."""
    contraction: Float[Tensor, "steps b"]
    """Geometric mean of the ratios of successive changes; NaN with fewer than two changes."""

    @property
    def converges(self) -> Tensor:
        """Tells, for each sample, whether every step's iteration contracts."""
        return (self.contraction < 1).all(dim=0)


def invert(
    denoise: Denoise,
    grid: SamplingGrid,
    x: Latents,
    inverter: Inverter,
    start: int | None = None,
    stop: int = 0,
    changes_have_gradients: bool = True,
) -> Inversion:
    """Walks from level `start` (None: clean data) up to the noisier level `stop`.

    Without gradients of residual and contraction, a gradient of x keeps less memory a step.
    """
    start = grid.num_steps if start is None else start
    if not 0 <= stop < start <= grid.num_steps:
        raise ValueError(f"cannot invert from level {start} to {stop} of {grid.num_steps}")
    residuals, contractions = [], []
    for step in reversed(range(stop, start)):
        iterates = _iterate(denoise, grid, step, x, inverter)
        x = iterates[-1]
        if not changes_have_gradients:
            iterates = [each.detach() for each in iterates]
        changes = [_norm(b - a) for a, b in zip(iterates, iterates[1:], strict=False)]
        residuals.append(changes[-1] / _norm(iterates[-1]).clamp(min=SMALLEST))
        contractions.append(_contraction(changes))
    return Inversion(x, torch.stack(residuals), torch.stack(contractions))


def step_to(reading: Prediction, grid: SamplingGrid, level: int) -> Tensor:
    """Returns the DDIM step from a reading of x_t to any level, cleaner or noisier."""
    alpha, sigma = grid.level(level)
    return alpha * reading.x0 + sigma * reading.eps


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
            iterates.append(_anderson(iterates, images, inverter.memory))
        else:
            iterates.append(images[-1])
    if inverter.method == "renoise":
        kept = readings[-inverter.num_averaged :]
        mean = Prediction(*(torch.stack(each).mean(dim=0) for each in zip(*kept, strict=True)))
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


def _anderson(iterates: list[Tensor], images: list[Tensor], memory: int) -> Tensor:
    """Returns the combination of the last images whose combined residual is least, by sample.

    Residuals are f_i = g(z_i) - z_i; with differences D of the last ones, gamma solves
    min |f_k - D gamma| and z = g(z_k) - dG gamma (Walker and Ni 2011, equation 2.2).
    """
    count = min(memory, len(images) - 1)
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


def bdia_sample(
    denoise: Denoise, grid: SamplingGrid, x: Latents, gamma: float = 1.0
) -> tuple[Latents, Latents]:
    """Runs BDIA from noise at level 0; returns the latents of the last two levels, clean last.

    The first step is DDIM's. One evaluation a step.
    """
    check_gamma(gamma)
    before, now = x, step_to(denoise(x, grid.timesteps[0]), grid, 1)
    for step in range(1, grid.num_steps):
        before, now = now, _bdia_step(denoise, grid, step, before, now, gamma)
    return before, now


def bdia_invert(
    denoise: Denoise, grid: SamplingGrid, before: Latents, clean: Latents, gamma: float = 1.0
) -> tuple[Latents, Latents]:
    """Undoes `bdia_sample`: takes the last two levels, returns the first two, the noise first."""
    check_gamma(gamma)
    now, after = before, clean
    for step in reversed(range(1, grid.num_steps)):
        reading = denoise(now, grid.timesteps[step])
        y_p, y_u = (step_to(reading, grid, level) for level in (step - 1, step + 1))
        now, after = (after - y_u) / gamma + y_p, now
    return now, after


def bdia_resample(
    denoise: Denoise, grid: SamplingGrid, noise: Latents, now: Latents, gamma: float = 1.0
) -> tuple[Latents, Latents]:
    """Runs BDIA from the first two levels, such as those of an inverted image."""
    check_gamma(gamma)
    before = noise
    for step in range(1, grid.num_steps):
        before, now = now, _bdia_step(denoise, grid, step, before, now, gamma)
    return before, now


def check_gamma(gamma: float) -> None:
    """Raises UserError for a gamma that BDIA is not invertible with."""
    if not 0 < gamma <= 1:
        raise UserError(f"gamma={gamma} must lie in (0, 1]; 1 is the exact pair's")


def _bdia_step(
    denoise: Denoise, grid: SamplingGrid, step: int, before: Tensor, now: Tensor, gamma: float
) -> Tensor:
    reading = denoise(now, grid.timesteps[step])
    y_p, y_u = (step_to(reading, grid, level) for level in (step - 1, step + 1))
    return gamma * (before - y_p) + y_u
