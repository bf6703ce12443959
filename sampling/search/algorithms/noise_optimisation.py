"""Noise optimisation: gradient ascent of a score on one noise, through the whole run.

Qi et al. 2024 (algorithm 2) ascend the stability of the noise,

    b <- m b + grad score(e),   e <- e + lr b,   lr = 100 d / 65,536,  m = .5

with d the elements of e: the gradient of a cosine is of order 1 / |e|, so that a step of this rate
turns e by the same angle at every size. Any differentiable verifier takes the place of stability
(ReNO, Eyring et al. 2024). Noise of a model has |e| near sqrt(d); what leaves that sphere paints
worse, so e is put back on it, or pulled by the gradient of

    log p(|e|) = (d - 1) log |e| - |e|^2 / 2

Every step's image is a candidate; the best that was seen wins, wherever the ascent ends.
"""

import math

import torch
from torch import Tensor

from blackpoint.sampling.search.algorithm_configs import NoiseOptimisationConfig
from blackpoint.sampling.search.trial import Given, Problem, Search, Seeded, Trial

ELEMENTS_OF_THE_PAPER = 65_536
LARGEST_NORM_CHANGE = 2.0
"""Ratio of norms, either way, at which an ascent without a sphere has left what a model knows."""


def noise_optimisation(problem: Problem, config: NoiseOptimisationConfig) -> Search:
    """Spends the budget on steps from one noise; ends early, with a note, where it diverges."""
    stop, price = problem.grid.num_steps, problem.gradient_cost
    seed = problem.draw_seed("candidate", 0)
    start: Seeded | Given = Seeded(seed)
    noise = momentum = None
    for number in range(problem.budget_nfe // price):
        parent = number - 1 if number else None
        [outcome] = yield [Trial(number, number, start, stop, "gradient", seed, parent)]
        assert outcome.state is not None
        gradient, noise = outcome.state.x[0].double(), outcome.state.x0
        assert noise is not None
        if math.isnan(outcome.score) or not torch.isfinite(gradient).all():
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
