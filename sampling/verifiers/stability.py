"""Stability of a noise under inversion: is it a fixed point of painting and inverting?

With x the latent that a deterministic run makes of noise e, and e' what inversion makes of x,

    cosine       cos(e, e')                                  (Qi et al. 2024, equation 5)
    residual     - mean over steps of |z_K - z_(K-1)| / |z_K|
    contraction  - mean over steps of the geometric mean of successive changes

The last two say how well the inversion's iteration does and need no comparison with e. A partial
round trip goes k steps down and back, at a fraction of the cost. An exact inverter gives the cosine
1 to every noise, so nothing can be ranked with it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.inversion import Inversion, Inverter, invert
from blackpoint.sampling.samplers import Denoise, SamplingGrid
from blackpoint.sampling.verifiers.verifier import Images

Measure = Literal["cosine", "residual", "contraction"]
FEWEST_ITERATIONS = {"residual": 2, "contraction": 3}
RoundTrip = tuple[Inverter, float, int | None]
"""How a run is inverted: the inverter, guidance of the inversion, steps of a partial trip."""


class Stability:
    """Verifier of a run from its noise; see `score_run`. It needs no picture."""

    preview_log_snr: float | None = None
    differentiable = False

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
                f"{inverter.evaluations} evaluations a step: it compares iterates; use "
                f"inversion=fixed_point with num_iterations of at least {fewest}"
            )
        self.name = name
        self.inverter = inverter
        self.measure = measure
        self.guidance_scale = guidance_scale
        self.partial_steps = partial_steps

    def level(self, stop: int) -> int:
        """Returns the level that a run to `stop` is inverted from."""
        return stop if self.partial_steps is None else min(self.partial_steps, stop)

    def evaluations(self, stop: int) -> int:
        """Returns the network evaluations of one score, guidance not counted."""
        return self.inverter.evaluations * self.level(stop)

    @property
    def round_trip(self) -> "RoundTrip":
        """What is run to score: verifiers with equal ones measure the same inversion."""
        return self.inverter, self.guidance_scale, self.partial_steps

    def score_run(
        self,
        noise: Float[Tensor, "n c h w"],
        x: Float[Tensor, "n c h w"],
        level: int,
        denoise: Denoise,
        grid: SamplingGrid,
    ) -> Float[Tensor, " n"]:
        """Returns the stability of noises from what their runs are at `level`."""
        return self.score_inversion(noise, self.invert(x, level, denoise, grid))

    def score_inversion(
        self, noise: Float[Tensor, "n c h w"], found: Inversion
    ) -> Float[Tensor, " n"]:
        """Returns the stability of noises whose runs were inverted to what was `found`."""
        match self.measure:
            case "cosine":
                rows = noise.to(found.x).flatten(1), found.x.flatten(1)
                return torch.cosine_similarity(*rows, dim=1)
            case "residual":
                return -found.residual.mean(dim=0)
            case "contraction":
                return -found.contraction.mean(dim=0)

    def invert(
        self, x: Float[Tensor, "n c h w"], level: int, denoise: Denoise, grid: SamplingGrid
    ) -> Inversion:
        """Inverts what runs are at `level`, back to noise."""
        return invert(
            denoise,
            grid,
            x,
            self.inverter,
            start=level,
            changes_have_gradients=self.measure != "cosine",
        )

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Raises RunFailed: a picture alone has no noise."""
        raise RunFailed(f"verifier {self.name} scores runs from their noise, not pictures")
