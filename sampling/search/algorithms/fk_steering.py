"""FK steering: particles of a stochastic sampler, resampled by the verifier's view of x0.

Sequential Monte Carlo (Singhal et al. 2025; Wu et al. 2023). With r_k the score of a particle's
x0-prediction at level k and lambda_k rising to lambda (tempering), the potential of a step is

    difference: lambda_k r_k - lambda_(k-1) r_(k-1)   (telescopes: the target is p exp(lambda r))
    max:        lambda_k max_(j <= k) r_j             (greedy)
    sum:        lambda_k sum_(j <= k) r_j

Log-weights are carried from level to level and reset by a resampling, which is systematic
(Carpenter et al. 1999) and happens where the effective sample size (sum w)^2 / sum w^2 falls below
a share of the particles. It needs a sampler with noise: copies of a particle would stay copies.

A preview without a finite score has weight 0 at its level and enters no maximum and no sum. The
difference has telescoped by the next level, so a finite score there restores the weight; a maximum
or a sum lacks a term until the next resampling, and the weight stays 0. Where all weights are 0
nothing can be preferred: all particles go on, with equal weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

import numpy as np

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges, require
from blackpoint.sampling.search.algorithms.tilt import check_compiled, check_noise, tilt_of
from blackpoint.sampling.search.problem import (
    Algorithm,
    Goal,
    Outcome,
    Problem,
    Search,
    Seeded,
    Trial,
)

if TYPE_CHECKING:
    from blackpoint.sampling.search.config import SearchOptions

TILTS: dict[str, Callable[[Sequence[float]], float]] = {
    "difference": itemgetter(-1),
    "max": max,
    "sum": sum,
}
"""A particle's scores so far, as its potential has them, over lambda."""
Potential = Literal["difference", "max", "sum"]


@dataclass
class FkSteeringConfig:
    """FK (Feynman-Kac) steering."""

    strength: float = 10.0
    """lambda: how strongly the score tilts the distribution."""
    potential: Potential = "difference"
    """How scores along the way become weights."""
    resample_every_steps: int = 5
    """Sampling steps between looks at the particles."""
    ess_threshold: float = 0.5
    """Resampling happens where the effective sample size is below this share; 1 is always."""
    tempering: float = 1.0
    """lambda_k = lambda (k / S)^tempering, S the sampling steps; 0 has lambda from the start."""
    tilt: float = 0.0
    """c of particles whose step noise is tilted by the score's gradient, as algorithm=tilt has it;
    0 is off."""
    tilt_gradient: Literal["x0", "x_t"] = "x0"
    """The gradient of that tilt (tilt.gradient)."""

    def __post_init__(self) -> None:
        section, strength = "fk_steering.", self.strength
        check_ranges(self, section, resample_every_steps=">= 1", ess_threshold=">= 0 and <= 1")
        check_ranges(self, section, tempering=">= 0", tilt=">= 0 and <= 1")
        require(math.isfinite(strength), f"{section}strength", strength, "finite")


def systematic(weights: Sequence[float], uniform: float) -> list[int]:
    """Returns the parent of each particle: points (u + i) / n on the cumulated weights."""
    shares = np.asarray(weights, dtype=np.float64)
    points = (uniform + np.arange(len(shares))) / len(shares)
    edges = np.cumsum(shares / shares.sum())
    return np.minimum(np.searchsorted(edges, points, side="right"), len(shares) - 1).tolist()


def effective_sample_size(log_weights: Sequence[float]) -> float:
    """Returns (sum w)^2 / sum w^2."""
    weights = normalised(log_weights)
    return 1 / float((weights**2).sum())


def normalised(log_weights: Sequence[float]) -> np.ndarray:
    """Returns weights that add up to 1; particles of weight 0 have log-weight -inf."""
    logs = np.asarray(log_weights, dtype=np.float64)
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def fk_steering(problem: Problem, config: FkSteeringConfig) -> Search:
    """Walks as many particles as the budget completes; every one is scored at the end."""
    last = problem.grid.num_steps
    count = problem.budget_nfe // problem.full_cost
    levels = [*range(config.resample_every_steps, last, config.resample_every_steps), last]
    seeds = [problem.draw_seed("candidate", number) for number in range(count)]
    particles: list[Outcome] = []
    log_weights, number = [0.0] * count, 0
    bases = [0.0] * count  # tilts at the last resampling
    history: list[list[float]] = [[] for _ in range(count)]
    for round_number, level in enumerate(levels):
        trials = []
        for slot in range(count):
            # The noise of the steps belongs to the slot: copies of a particle part here.
            seed = seeds[slot] if not particles else problem.draw_seed("slot", round_number, slot)
            start = particles[slot].reached if particles else Seeded(seed)
            goal: Goal = "final" if level == last else "preview"
            parent = particles[slot].trial.candidate if particles else None
            trials.append(Trial(round_number, number, start, level, goal, seed, parent))
            number += 1
        particles = yield trials
        strength = config.strength * (level / last) ** config.tempering
        tilts = [0.0] * count
        for slot, particle in enumerate(particles):
            if not math.isfinite(particle.score):
                log_weights[slot] = -math.inf
                continue
            history[slot].append(particle.score)
            tilts[slot] = strength * TILTS[config.potential](history[slot])
            carried = -bases[slot] if config.potential == "difference" else log_weights[slot]
            log_weights[slot] = carried + tilts[slot]
        if level == last:
            return
        if max(log_weights) == -math.inf:
            log_weights = [0.0] * count
            continue
        if effective_sample_size(log_weights) < config.ess_threshold * count:
            uniform = problem.draw_seed("resample", round_number) / 2**31
            parents = systematic(normalised(log_weights).tolist(), uniform)
            particles = [particles[parent] for parent in parents]
            bases = [tilts[parent] for parent in parents]
            history = [list(history[parent]) for parent in parents]
            log_weights = [0.0] * count


def check(search: "SearchOptions", config: FkSteeringConfig) -> None:
    """Raises UserError without noise in the steps, or without a score to weigh by."""
    check_noise(search, "copies of a particle would stay copies without noise in the steps")
    if config.tilt:
        check_compiled(search, config.tilt_gradient, "fk_steering.tilt_gradient")
    if len(search.verifiers) > 1 and search.ensemble != "weighted_sum":
        raise UserError(
            f"ensemble={search.ensemble}: algorithm=fk_steering weighs particles by a score, "
            "which a rank is not; use ensemble=weighted_sum"
        )


ALGORITHM = Algorithm(
    fk_steering,
    FkSteeringConfig,
    form="mixed",
    check=check,
    tilt=lambda search, config: tilt_of(search, config.tilt, config.tilt_gradient),
)
