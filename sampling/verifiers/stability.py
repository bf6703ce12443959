"""Stability of a noise under inversion: is it a fixed point of sampling and inverting?

With x the latent that a deterministic run makes of noise e, and e' what inversion makes of x,

    cosine       cos(e, e')                                  (Qi et al. 2024, equation 5)
    residual     - mean over steps of |z_K - z_(K-1)| / |z_K|
    contraction  - mean over steps of the geometric mean of successive changes

The last two say how well the inversion's iteration does and need no comparison with e. A partial
round trip goes k steps down and back, at a fraction of the cost. An exact inverter gives the cosine
1 to every noise, so nothing can be ranked with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blackpoint.sampling.grid import Denoise, SamplingGrid
    from blackpoint.sampling.inversion import Inversion, Inverter
    from blackpoint.sampling.pipelines.painter import Levels
    from blackpoint.sampling.verifiers.verifier import Latents

Measure = Literal["cosine", "residual", "contraction"]
FEWEST_ITERATIONS = {"residual": 2, "contraction": 3}


@dataclass
class StabilityConfig(VerifierOptions):
    """Keys of kind=stability."""

    measure: Measure = "cosine"
    """stability: of the noise with the re-inverted one, or how well the inversion's iteration does
    (minus the last change, minus the rate of changes)."""
    inversion: Literal["ddim", "fixed_point", "anderson", "renoise"] = "ddim"
    """stability: how a step is inverted."""
    num_iterations: int = 5
    """stability: network evaluations per step; ddim has one."""
    model_time: Literal["noisy", "clean"] = "noisy"
    """stability, inversion=ddim: end of a step whose timestep the network is asked at (diffusers:
    noisy)."""
    inversion_guidance_scale: float = 1.0
    """stability: guidance of the inversion; 1 is off, and halves its NFE."""
    partial_steps: int | None = None
    """stability: invert from after so many sampling steps; from where the run stands if not set."""


class Stability:
    """Verifier of a run from its noise."""

    def __init__(
        self,
        inverter: Inverter,
        measure: Measure = "cosine",
        guidance_scale: float = 1.0,
        partial_steps: int | None = None,
        name: str = "stability",
    ) -> None:
        fewest = FEWEST_ITERATIONS.get(measure, 1)
        if inverter.evaluations < fewest:
            raise UserError(
                f"measure={measure} with inversion={inverter.method} and "
                f"{inverter.evaluations} evaluations per step: it compares iterates; use "
                f"inversion=fixed_point with num_iterations of at least {fewest}"
            )
        self.name, self.inverter, self._measure = name, inverter, measure
        self.guidance_scale, self.partial_steps = guidance_scale, partial_steps

    @property
    def measurement(self) -> tuple[Inverter, float, int | None]:
        """The round trip: the inverter, its guidance, and the steps of a partial one."""
        return self.inverter, self.guidance_scale, self.partial_steps

    def prepare(self, process: Levels) -> None:
        """Takes the form of the inversion that the prediction type needs."""
        self.inverter = self.inverter.of(process)

    def level(self, stop: int) -> int:
        """Returns the level that a run to `stop` is inverted from."""
        return stop if self.partial_steps is None else min(self.partial_steps, stop)

    def evaluations(self, stop: int) -> int:
        """Returns the network evaluations of one score, guidance not counted."""
        return self.inverter.evaluations * self.level(stop)

    def measure(self, x: Latents, level: int, denoise: Denoise, grid: SamplingGrid) -> Inversion:
        """Inverts the states of runs at `level` back to noise."""
        from blackpoint.sampling.inversion import invert

        with_gradients = self._measure != "cosine"
        return invert(
            denoise, grid, x, self.inverter, start=level, changes_have_gradients=with_gradients
        )

    def score_measured(self, noise: Latents, measured: Inversion) -> Tensor:
        """Returns the stability of noises whose runs were inverted."""
        from torch import cosine_similarity

        match self._measure:
            case "cosine":
                x = measured.x
                return cosine_similarity(noise.to(x).flatten(1), x.flatten(1), dim=1)
            case "residual":
                return -measured.residual.mean(dim=0)
            case "contraction":
                return -measured.contraction.mean(dim=0)


def load(config: StabilityConfig, device: torch.device, dtype: torch.dtype) -> Stability:
    """Makes the verifier; it has no weights of its own."""
    from blackpoint.sampling.inversion import Inverter

    inverter = Inverter(config.inversion, config.num_iterations, config.model_time)
    guidance_scale = config.inversion_guidance_scale
    return Stability(inverter, config.measure, guidance_scale, config.partial_steps, config.column)


def check(config: StabilityConfig) -> None:
    """Raises UserError for an inversion that cannot be."""
    if config.partial_steps is not None and config.partial_steps < 1:
        raise UserError(f"partial_steps={config.partial_steps} must be at least 1")
    if config.num_iterations < 1:
        raise UserError(f"num_iterations={config.num_iterations} must be at least 1")
    if config.inversion_guidance_scale < 0:
        raise UserError(
            f"inversion_guidance_scale={config.inversion_guidance_scale} must be at least 0"
        )


KIND = VerifierKind(
    load,
    StabilityConfig,
    check,
    needs="trajectory",
    looks="compares a run with its noise",
    forms=("whole", "parts", "gradient"),
    highest=lambda config: float(config.measure == "cosine"),
    inverts=True,
)
