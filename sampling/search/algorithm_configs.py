"""The settings of the search algorithms, each beside the others; free of torch.

Names and values are those of the papers; the algorithms are in the files of the same names.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from data.files.errors import UserError

Potential = Literal["difference", "max", "sum"]


@dataclass
class RandomSearchConfig:
    """Best-of-N."""

    first_seed: int | None = None
    """Seeds are first_seed, first_seed + 1, ...; not set: drawn from the run's seed and prompt."""


@dataclass
class ZeroOrderConfig:
    """ZO-N."""

    num_neighbours: int = 2
    """Neighbours of the pivot a round, N; the authors have 2 for text-to-image, 4 on ImageNet."""
    cosine: float = 0.95
    """Cosine of the angle between a neighbour and the pivot."""

    def __post_init__(self) -> None:
        if self.num_neighbours < 1:
            raise UserError(f"num_neighbours={self.num_neighbours} must be at least 1")
        if not -1 <= self.cosine < 1:
            raise UserError(
                f"cosine={self.cosine} must lie in [-1, 1); 1 would be the pivot itself"
            )


@dataclass
class PathsConfig:
    """Paths-N."""

    num_paths: int = 2
    """Survivors of a round, N."""
    num_expansions: int = 4
    """Re-noisings of each survivor, M."""
    sigma: float = 0.11
    """Time tau that the first N noises are denoised to, and the search begins at."""
    delta_f: float = 0.78
    """tau added by a re-noising; less where the start would be passed."""
    delta_b: float = 0.81
    """tau removed after it; more than delta_f."""

    def __post_init__(self) -> None:
        if self.num_paths < 1 or self.num_expansions < 1:
            raise UserError("num_paths and num_expansions must be at least 1")
        if not 0 < self.sigma < 1:
            raise UserError(f"sigma={self.sigma} must lie between 0 and 1 (a time tau)")
        if not 0 < self.delta_f < self.delta_b:
            raise UserError(
                f"delta_f={self.delta_f} and delta_b={self.delta_b}: each round must gain, so "
                "0 < delta_f < delta_b"
            )


@dataclass
class HalvingConfig:
    """Successive halving."""

    levels: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Where to look, in shares of the sampling steps."""
    keep: float = 0.5
    """Share of the candidates that stays at each of them."""
    min_kendall: float = 0.3
    """Least rank correlation of preview and final score at which a level prunes."""
    calibration_prompts: int = 8
    """Prompts, the first ones, on which that correlation is measured, beside the budget."""
    calibration_candidates: int = 8
    """Whole runs of each of them for the measurement."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not rising or not 0 < self.levels[0] <= self.levels[-1] < 1:
            raise UserError(f"levels={self.levels} must be shares between 0 and 1, rising")
        if self.calibration_prompts < 1 or self.calibration_candidates < 2:
            raise UserError(
                "halving needs at least 1 of calibration_prompts and 2 of calibration_candidates"
            )
        if not 0 < self.keep < 1:
            raise UserError(f"keep={self.keep} must lie between 0 and 1")
        if not -1 <= self.min_kendall <= 1:
            raise UserError(f"min_kendall={self.min_kendall} must lie in [-1, 1]")


@dataclass
class NoiseOptimisationConfig:
    """Gradient ascent on one noise."""

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
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate} must be above 0")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.norm_weight < 0:
            raise UserError(f"norm_weight={self.norm_weight} must be at least 0")
        if self.largest_gradient is not None and not self.largest_gradient > 0:
            raise UserError(f"largest_gradient={self.largest_gradient} must be above 0")


@dataclass
class FkSteeringConfig:
    """Feynman-Kac steering."""

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

    def __post_init__(self) -> None:
        if self.resample_every_steps < 1:
            raise UserError(f"resample_every_steps={self.resample_every_steps} must be at least 1")
        if not 0 <= self.ess_threshold <= 1:
            raise UserError(f"ess_threshold={self.ess_threshold} must lie in 0..1")
        if self.tempering < 0 or not math.isfinite(self.strength):
            raise UserError("tempering must be at least 0 and strength finite")
