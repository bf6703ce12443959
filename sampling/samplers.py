"""Samplers in (alpha, sigma), finite at zero terminal SNR, walking a timestep list by index.

A step goes from noise level i of a grid to level i + 1. The last level is clean data (alpha 1,
sigma 0), or for ddim the process's final alpha_bar (`Process.grid`). Every sampler is a function of
one step, so a run can stop at any level, preview, add noise and go on. With x0 and eps the
network's reading of x_t:

    DDIM (Song et al. 2021):  x_u = alpha_u x0 + sqrt(sigma_u^2 - s^2) eps + s z,
                              s = eta (sigma_u / sigma_t) sqrt(1 - alpha_t^2 / alpha_u^2)
    Heun in the angle:        phi = atan2(sigma, alpha), dx / dphi = v = alpha eps - sigma x0
    DPM++ 2M (Lu et al. 2022): x_u = r x_t + (alpha_u - alpha_t r) D,  r = sigma_u / sigma_t

Euler is DDIM with eta 0, Euler ancestral is DDIM with eta 1, on a grid that ends at clean data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.schedule import NoiseSchedule


class Prediction(NamedTuple):
    """The network's reading of x_t, both float32 (B, C, H, W)."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, int], Prediction]  # (x_t, t) -> x0 and eps
StepNoise = Callable[[int], Tensor]  # step index -> unit noise like x


@dataclass(frozen=True)
class SamplingGrid:
    """The noise levels of a run: S timesteps and, as level S, where it ends (`of`)."""

    timesteps: tuple[int, ...]
    alpha: tuple[float, ...]  # S + 1 values
    sigma: tuple[float, ...]  # S + 1 values

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, timesteps: Sequence[int], final_alpha_bar: float = 1.0
    ) -> "SamplingGrid":
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


@dataclass(frozen=True)
class SampleState:
    """A run at level `step`. `x0` is the latest reading of the data: a preview, and the memory of
    multistep samplers; None at the start and after re-noising."""

    x: Tensor
    step: int = 0
    x0: Tensor | None = None


def ddim_step(
    denoise: Denoise, grid: SamplingGrid, state: SampleState, eta: float, noise: StepNoise | None
) -> SampleState:
    """Takes one DDIM step; eta 0 is deterministic, eta 1 ancestral. One evaluation."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(state.step), grid.level(state.step + 1)
    x0, eps = denoise(state.x, grid.timesteps[state.step])
    fresh = eta * (sigma_u / sigma_t) * math.sqrt(max(0.0, 1 - (alpha_t / alpha_u) ** 2))
    x = alpha_u * x0 + math.sqrt(max(0.0, sigma_u**2 - fresh**2)) * eps
    if fresh > 0:
        assert noise is not None
        x = x + fresh * noise(state.step).to(x)
    return SampleState(x, state.step + 1, x0)


def heun_step(denoise: Denoise, grid: SamplingGrid, state: SampleState) -> SampleState:
    """Takes one Heun step in the angle. Two evaluations, one on the last step.

    sigma / alpha diverges at zero terminal SNR; the angle runs from pi / 2 to 0.
    """
    (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(state.step), grid.level(state.step + 1)
    x0, eps = denoise(state.x, grid.timesteps[state.step])
    if sigma_u == 0:
        return SampleState(x0, state.step + 1, x0)
    angle = math.atan2(sigma_u, alpha_u) - math.atan2(sigma_t, alpha_t)
    v = alpha_t * eps - sigma_t * x0
    x0_next, eps_next = denoise(state.x + angle * v, grid.timesteps[state.step + 1])
    v_next = alpha_u * eps_next - sigma_u * x0_next
    return SampleState(state.x + angle / 2 * (v + v_next), state.step + 1, x0)


def dpmpp_2m_step(denoise: Denoise, grid: SamplingGrid, state: SampleState) -> SampleState:
    """Takes one DPM-Solver++ (2M) step; first order where there is no memory. One evaluation.

    Lu et al. 2022, Algorithm 2, with h = log-SNR / 2 differences. At zero terminal SNR the first h
    is infinite, so the second step is first order too; the last step to clean data always is.
    """
    step = state.step
    (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(step), grid.level(step + 1)
    x0, _ = denoise(state.x, grid.timesteps[step])
    direction = x0
    if state.x0 is not None and sigma_u > 0 and step > 0 and grid.alpha[step - 1] > 0:
        before = _half_log_snr(*grid.level(step - 1))
        here, after = _half_log_snr(alpha_t, sigma_t), _half_log_snr(alpha_u, sigma_u)
        direction = x0 + (after - here) / (2 * (here - before)) * (x0 - state.x0)
    x = (sigma_u / sigma_t) * state.x + (alpha_u - alpha_t * sigma_u / sigma_t) * direction
    return SampleState(x, step + 1, x0)


def _half_log_snr(alpha: float, sigma: float) -> float:
    return math.log(alpha) - math.log(sigma)


SAMPLERS = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
END_AT_FINAL_ALPHA_BAR = ("ddim",)
"""Samplers that end at the process's final alpha_bar. The others end at clean data, as diffusers'
Euler, Euler ancestral, Heun and DPM++ 2M do, which have no `set_alpha_to_one`."""


def run(
    sampler: str,
    denoise: Denoise,
    grid: SamplingGrid,
    state: SampleState,
    stop: int | None = None,
    eta: float | None = None,
    noise: StepNoise | None = None,
    on_step: Callable[[SampleState], None] | None = None,
) -> SampleState:
    """Runs from `state.step` to level `stop` (None: clean data).

    `eta` goes with ddim alone. `noise(step)` is asked for by eta > 0 and euler_ancestral; it must
    depend on the step only, so that a run in two parts equals an unbroken one.
    """
    check_sampler(sampler, eta)
    stop = grid.num_steps if stop is None else stop
    if not 0 <= state.step <= stop <= grid.num_steps:
        raise ValueError(f"cannot run from level {state.step} to {stop} of {grid.num_steps}")
    strength = {"ddim": eta or 0.0, "euler_ancestral": 1.0}.get(sampler, 0.0)
    if strength > 0 and noise is None:
        raise ValueError(f"{sampler} with eta {strength} draws noise: pass noise=")
    while state.step < stop:
        match sampler:
            case "heun":
                state = heun_step(denoise, grid, state)
            case "dpmpp_2m":
                state = dpmpp_2m_step(denoise, grid, state)
            case _:
                state = ddim_step(denoise, grid, state, strength, noise)
        if on_step is not None:
            on_step(state)
    return state


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


def check_sampler(sampler: str, eta: float | None = None) -> None:
    """Raises UserError for an unknown sampler, or an eta that it does not take."""
    if sampler not in SAMPLERS:
        near = get_close_matches(sampler, SAMPLERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}{hint}")
    if eta is not None and sampler != "ddim":
        raise UserError(f"eta={eta} goes with sampler=ddim alone, not with {sampler}")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"eta={eta} must lie in 0..1: 0 is deterministic, 1 ancestral")
