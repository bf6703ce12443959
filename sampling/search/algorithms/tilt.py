"""Tilted step noise: best-of-N over runs whose fresh noise leans towards a higher score.

NTRK / NoiseTilt 2026 (arXiv 2606.18066): the gradient of the score enters through the noise of a
stochastic sampler's steps, whitened, so that a run stays one that the model knows. With z the fresh
noise of a step, g the gradient of the score at its x0-prediction and d elements,

    z' = sqrt(1 - c^2) z + c w,    w = IFFT(FFT(g) / |FFT(g)|) scaled to |w| = sqrt(d)

(sampling/search/gradients.py). The network is not differentiated, so an image costs the NFE of a
plain one, and a decode and a gradient of every verifier per step; gradient=x_t goes through the
network, and a step counts 3 (RTS 2026, arXiv 2605.21907, does so on a part of the steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.problem import Algorithm, Problem, Search, Tilt

if TYPE_CHECKING:
    from blackpoint.sampling.search.config import SearchOptions


@dataclass
class TiltConfig:
    """Best-of-N over runs with tilted step noise."""

    strength: float = 0.1
    """c: share of the score's whitened gradient in the noise of each step; 0 has none, .05 to .3
    are of use."""
    gradient: Literal["x0", "x_t"] = "x0"
    """Gradient at the x0-prediction, which needs no backward pass of the network, or at x_t through
    the network, which counts 3 NFE a row."""

    def __post_init__(self) -> None:
        check_ranges(self, "tilt.", strength=">= 0 and <= 1")


def tilt(problem: Problem, config: TiltConfig) -> Search:
    """Spends the budget on whole images; that their noise is tilted is the runner's business."""
    return random_search(problem, RandomSearchConfig())


def tilt_of(search: SearchOptions, strength: float, gradient: Literal["x0", "x_t"]) -> Tilt | None:
    """Returns how step noise is tilted; None where it is not."""
    sums_scores = search.ensemble == "weighted_sum"
    return Tilt(strength, gradient, sums_scores) if strength > 0 else None


def check_noise(search: SearchOptions, reason: str) -> None:
    """Raises UserError, with the reason, for a sampler that draws no noise in its steps."""
    if not SAMPLERS[search.sampler].fresh_noise(search.eta):
        always = [f"sampler={name}" for name, kind in SAMPLERS.items() if kind.stochastic]
        chosen = [f"sampler={name}" for name, kind in SAMPLERS.items() if kind.takes_eta]
        raise UserError(
            f"algorithm={search.algorithm} with sampler={search.sampler}: {reason}; use "
            f"{' or '.join(always)}, or {' or '.join(chosen)} with eta above 0"
        )


def check_compiled(search: SearchOptions, gradient: str, key: str) -> None:
    """Raises UserError for a compiled UNet that the gradient would go through."""
    if search.compile and gradient == "x_t":
        raise UserError(
            f"compile=true: {key}=x_t differentiates the network, which a compiled UNet is not "
            f"made for; leave compile out, or use {key}=x0"
        )


def check(search: SearchOptions, config: TiltConfig) -> None:
    """Raises UserError without noise in the steps, or where no verifier leads anywhere."""
    check_noise(search, "it tilts the fresh noise of the steps, and there is none (eta=1 is best)")
    check_compiled(search, config.gradient, "tilt.gradient")
    for name, verifier in search.verifiers.items():
        if verifier.declared.needs == "trajectory":
            raise UserError(
                f"verifiers.{name}: kind={verifier.kind} {verifier.declared.looks}, and algorithm="
                f"{search.algorithm} follows the gradient of one image's score; use another kind"
            )


ALGORITHM = Algorithm(
    tilt,
    TiltConfig,
    form="whole",
    check=check,
    tilt=lambda search, config: tilt_of(search, config.strength, config.gradient),
)
