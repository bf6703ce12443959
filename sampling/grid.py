"""The path of a sampler: readings of the network, noise levels, and the state between two steps.

Free of torch at import, so that a config can list the samplers and its help is instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from blackpoint.sampling.schedule import NoiseSchedule
else:
    Tensor = Any


class Prediction(NamedTuple):
    """The network's reading of x_t, both float32 (B, C, H, W)."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, Any], Prediction]  # (x_t, timestep of the grid) -> x0 and eps
StepNoise = Callable[[int], Tensor]  # step index -> unit noise like x


@dataclass(frozen=True)
class SamplingGrid:
    """The noise levels of a run: S timesteps and, as level S, where it ends (`of`).

    alpha^2 + sigma^2 is 1 for diffusion, and alpha + sigma for flow matching. A timestep means
    something to the model that the grid is of, and to nobody else.
    """

    timesteps: tuple[Any, ...]
    alpha: tuple[float, ...]  # S + 1 values
    sigma: tuple[float, ...]  # S + 1 values

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, timesteps: Sequence[int], final_alpha_bar: float = 1.0
    ) -> SamplingGrid:
        """Reads the levels of `timesteps` (noisiest first) from the schedule.

        Level S has `final_alpha_bar`; 1 is clean data.
        """
        alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
        return cls(
            tuple(timesteps),
            (*(alpha[t] for t in timesteps), math.sqrt(final_alpha_bar)),
            (*(sigma[t] for t in timesteps), math.sqrt(1 - final_alpha_bar)),
        )

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def level(self, step: int) -> tuple[float, float]:
        """Returns (alpha, sigma) of level `step`."""
        return self.alpha[step], self.sigma[step]

    def log_snr(self, step: int) -> float:
        """Returns log(alpha^2 / sigma^2) of level `step`, which may be infinite."""
        alpha, sigma = self.level(step)
        if alpha == 0 or sigma == 0:
            return -math.inf if alpha == 0 else math.inf
        return 2 * (math.log(alpha) - math.log(sigma))


@dataclass(frozen=True)
class SampleState:
    """A run at level `step`. `x0` is the latest reading of the data: a preview, and the memory of
    multistep samplers; None at the start and after re-noising."""

    x: Tensor
    step: int = 0
    x0: Tensor | None = None


def renoise(grid: SamplingGrid, state: SampleState, step: int, noise: Tensor) -> SampleState:
    """Goes back to the noisier level `step` by the forward process; `noise` is unit noise like x.

    x_t' = (alpha_t' / alpha_t) x_t + sqrt(sigma_t'^2 - (alpha_t' / alpha_t)^2 sigma_t^2) z
    """
    if not 0 <= step <= state.step:
        raise ValueError(f"cannot re-noise level {state.step} to the cleaner level {step}")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = grid.level(state.step), grid.level(step)
    ratio = alpha_s / alpha_t if alpha_t > 0 else 1.0  # at alpha_t = 0, level and step are both 0
    fresh = math.sqrt(max(0.0, sigma_s**2 - (ratio * sigma_t) ** 2))
    return replace(state, x=ratio * state.x + fresh * noise.to(state.x), step=step, x0=None)
