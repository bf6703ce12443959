"""Noise optimisation: gradient ascent of a score on one noise, through the whole run.

Qi et al. 2024 (algorithm 2) ascend the stability of the noise,

    b <- m b + grad score(e),   e <- e + lr b,   lr = 100 d / 65,536,  m = .5

with d the elements of e: the gradient of a cosine is of order 1 / |e|, so that a step of this rate
turns e by the same angle at every size. Any differentiable verifier takes the place of stability
(ReNO, Eyring et al. 2024). Noise of a model has |e| near sqrt(d); noise off that sphere gives
worse, so e is put back on it, or pulled by the gradient of

    log p(|e|) = (d - 1) log |e| - |e|^2 / 2

Every step's image is a candidate; the best that was seen wins, wherever the ascent ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.search.problem import Algorithm, Given, Problem, Search, Seeded, Trial

if TYPE_CHECKING:
    from torch import Tensor

    from blackpoint.sampling.search.config import SearchOptions


ELEMENTS_OF_THE_PAPER = 65_536
LARGEST_NORM_CHANGE = 2.0
"""Ratio of norms, either way, at which an ascent without a sphere has left the model's domain."""


@dataclass
class NoiseOptimisationConfig:
    """Noise optimisation, gradient ascent on one noise."""

    learning_rate: float = 100.0
    """Rate of a step for a noise of 65,536 elements; it is scaled with their number."""
    momentum: float = 0.5
    """Share of the step before that a step keeps."""
    gradient: Literal["full", "fixed_inverse"] = "full"
    """Through the whole run and its score, or with the re-inverted noise held fixed (stability)."""
    norm: Literal["sphere", "regularised", "free"] = "sphere"
    """Keep the noise's norm, pull it to that of unit noise, or let it go."""
    norm_weight: float = 0.01
    """norm=regularised: weight of the gradient of log p(|e|)."""
    largest_gradient: float | None = None
    """Norm that gradients with their momentum are cut to; not cut if not set."""

    def __post_init__(self) -> None:
        section = "noise_optimisation."
        check_ranges(self, section, learning_rate="> 0", momentum=">= 0 and < 1")
        check_ranges(self, section, norm_weight=">= 0", largest_gradient="> 0")


def noise_optimisation(problem: Problem, config: NoiseOptimisationConfig) -> Search:
    """Spends the budget on steps from one noise; ends early, with a note, where it diverges."""
    stop, price = problem.grid.num_steps, problem.gradient_cost
    seed = problem.draw_seed("candidate", 0)
    start: Seeded | Given = Seeded(seed)
    noise = momentum = None
    for number in range(problem.budget_nfe // price):
        parent = number - 1 if number else None
        [outcome] = yield [Trial(number, number, start, stop, "gradient", seed, parent)]
        gradient, noise = outcome.reached.x[0].double(), outcome.reached.x0
        assert noise is not None
        if math.isnan(outcome.score) or not gradient.isfinite().all():
            return f"stopped after {number + 1} steps: the score or its gradient is not finite"
        e = noise[0].double()
        norm = e.norm()
        momentum = gradient if momentum is None else config.momentum * momentum + gradient
        pull = config.norm_weight * _log_density_gradient(e) if config.norm == "regularised" else 0
        e = e + rate(config, e) * (_clipped(momentum, config.largest_gradient) + pull)
        if config.norm == "sphere":
            e = e * (norm / e.norm())
        elif not 1 / LARGEST_NORM_CHANGE < e.norm() / math.sqrt(e.numel()) < LARGEST_NORM_CHANGE:
            return (
                f"stopped after {number + 1} steps: the noise's norm is {e.norm():.3g}, far from "
                f"{math.sqrt(e.numel()):.3g}; lower the learning rate, or use norm=sphere"
            )
        start = Given(e.float())
    return ""


def rate(config: NoiseOptimisationConfig, noise: Tensor) -> float:
    """Returns the learning rate at this size of noise."""
    return config.learning_rate * noise.numel() / ELEMENTS_OF_THE_PAPER


def _log_density_gradient(noise: Tensor) -> Tensor:
    norm = noise.norm()
    return ((noise.numel() - 1) / norm - norm) * noise / norm


def _clipped(gradient: Tensor, largest: float | None) -> Tensor:
    if largest is None:
        return gradient
    return gradient * min(1.0, largest / max(gradient.norm().item(), 1e-12))


def check(search: SearchOptions, config: NoiseOptimisationConfig) -> None:
    """Raises UserError where there is nothing to differentiate, or nothing that can be."""
    if len(search.verifiers) != 1:
        raise UserError(
            f"algorithm=noise_optimisation ascends one score and {len(search.verifiers)} "
            "verifiers are set; leave one"
        )
    if search.compile:
        raise UserError(
            "compile=true: algorithm=noise_optimisation differentiates the run with gradient "
            "checkpointing, which a compiled UNet is not made for; leave compile out"
        )
    if SAMPLERS[search.sampler].fresh_noise(search.eta):
        raise UserError(
            f"sampler={search.sampler}, eta={search.eta}: algorithm=noise_optimisation needs a "
            "deterministic sampler; use ddim without eta"
        )
    [verifier] = search.verifiers.values()
    fixed = config.gradient == "fixed_inverse"
    if fixed and not (verifier.declared.inverts and verifier.measure == "cosine"):
        raise UserError(
            "noise_optimisation.gradient=fixed_inverse holds the re-inverted noise fixed, so "
            "it goes with kind=stability, measure=cosine; use gradient=full"
        )


ALGORITHM = Algorithm(noise_optimisation, NoiseOptimisationConfig, form="gradient", check=check)
