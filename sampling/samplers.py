"""Samplers in (alpha, sigma), finite at zero terminal SNR, walking a timestep list by index.

A step goes from noise level i of a grid to level i + 1. The last level is clean data (alpha 1,
sigma 0), or for ddim the process's final alpha_bar (`Process.grid`). Every sampler is a function of
one step, so a run can stop at any level, preview, add noise and go on. With x0 and eps the
network's reading of x_t:

    DDIM (Song et al. 2021):  x_u = alpha_u x0 + sqrt(sigma_u^2 - s^2) eps + s z,
                              s = eta (sigma_u / sigma_t) sqrt(sigma_t^2 - r^2),
                              r = alpha_t sigma_u / alpha_u
    Heun in the angle:        phi = atan2(sigma, alpha), dy / dphi = (alpha eps - sigma x0) / rho,
                              y = x / rho, rho = sqrt(alpha^2 + sigma^2)
    DPM++ 2M (Lu et al. 2022): x_u = r x_t + (alpha_u - alpha_t r) D,  r = sigma_u / sigma_t

They hold for any (alpha, sigma): rho is 1 for diffusion, where s is the published eta (sigma_u /
sigma_t) sqrt(1 - alpha_t^2 / alpha_u^2); (1 - t, t) is flow matching, whose Euler step is DDIM's.
Euler is DDIM with eta 0, Euler ancestral is DDIM with eta 1, on a grid that ends at clean data.
`SAMPLERS` is the table of them; what a sampler can do is declared there (`Sampler`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import Denoise, SampleState, SamplingGrid, StepNoise

Step = Callable[[Denoise, SamplingGrid, SampleState, float, StepNoise | None], SampleState]
"""(denoise, grid, state, eta, noise) -> the state one level on; eta is the share of fresh noise."""


@dataclass(frozen=True)
class Counterpart:
    """The scheduler class of diffusers that must agree with a sampler, and how closely.

    Tolerances are absolute, in units of the largest latent (at least 1).
    """

    title: str
    scheduler: str
    tolerance: float = 3e-5
    zero_snr_tolerance: float = 3e-5
    has_stand_in: bool = True
    """Whether it puts another alpha_bar in place of 0, because it divides by alpha."""
    starts_at_sigma: bool = False
    """Whether it starts at x_t = sigma_t eps, but for leading timesteps."""
    walks_linspace: bool = True
    """Whether a linspace list comes out as it is written."""


@dataclass(frozen=True)
class Sampler:
    """A sampling step and its declared properties."""

    step: Step
    evaluations_per_step: int = 1
    """Of the network: one at the step's own timestep, the others at the next, which the last step
    does without."""
    stochastic: bool = False
    """Whether every run draws noise."""
    takes_eta: bool = False
    """Whether the user chooses the share of fresh noise."""
    is_ddim: bool = False
    """Whether a run without fresh noise is DDIM, which can be inverted (sampling/inversion.py)."""
    ends_at_final_alpha_bar: bool = False
    """Whether it ends at the process's final alpha_bar. The others end at clean data, as those of
    diffusers do, which have no `set_alpha_to_one`."""
    is_multistep: bool = False
    """Whether diffusers counts it among the multistep solvers, whose lists of timesteps differ."""
    counterpart: Counterpart | None = None
    """Scheduler of diffusers that an export is checked against."""

    def fresh_noise(self, eta: float | None) -> float:
        """Returns the share of fresh noise in a step: 0 is deterministic, 1 ancestral."""
        return (eta or 0.0) if self.takes_eta else float(self.stochastic)


def ddim_step(
    denoise: Denoise, grid: SamplingGrid, state: SampleState, eta: float, noise: StepNoise | None
) -> SampleState:
    """Takes one DDIM step; eta 0 is deterministic, eta 1 ancestral. One evaluation."""
    (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(state.step), grid.level(state.step + 1)
    x0, eps = denoise(state.x, grid.timesteps[state.step])
    spread = math.sqrt(max(0.0, sigma_t**2 - (alpha_t * sigma_u / alpha_u) ** 2))
    fresh = eta * (sigma_u / sigma_t) * spread
    x = alpha_u * x0 + math.sqrt(max(0.0, sigma_u**2 - fresh**2)) * eps
    if fresh > 0:
        assert noise is not None
        x = x + fresh * noise(state.step).to(x)
    return SampleState(x, state.step + 1, x0)


def heun_step(
    denoise: Denoise, grid: SamplingGrid, state: SampleState, eta: float, noise: StepNoise | None
) -> SampleState:
    """Takes one Heun step in the angle. Two evaluations, one on the last step.

    sigma / alpha diverges at zero terminal SNR; the angle runs from pi / 2 to 0.
    """
    (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(state.step), grid.level(state.step + 1)
    x0, eps = denoise(state.x, grid.timesteps[state.step])
    if sigma_u == 0:
        return SampleState(x0, state.step + 1, x0)
    rho_t, rho_u = math.hypot(alpha_t, sigma_t), math.hypot(alpha_u, sigma_u)
    angle = math.atan2(sigma_u, alpha_u) - math.atan2(sigma_t, alpha_t)
    y = state.x / rho_t
    v = (alpha_t * eps - sigma_t * x0) / rho_t
    x0_next, eps_next = denoise(rho_u * (y + angle * v), grid.timesteps[state.step + 1])
    v_next = (alpha_u * eps_next - sigma_u * x0_next) / rho_u
    return SampleState(rho_u * (y + angle / 2 * (v + v_next)), state.step + 1, x0)


def dpmpp_2m_step(
    denoise: Denoise, grid: SamplingGrid, state: SampleState, eta: float, noise: StepNoise | None
) -> SampleState:
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


SAMPLERS = {
    "ddim": Sampler(
        ddim_step,
        takes_eta=True,
        is_ddim=True,
        ends_at_final_alpha_bar=True,
        counterpart=Counterpart(
            "DDIM", "DDIMScheduler", has_stand_in=False, walks_linspace=False
        ),  # their DDIM steps by T // S and so leaves a linspace list
    ),
    "euler": Sampler(
        ddim_step,
        is_ddim=True,
        # They keep x / alpha, at zero terminal SNR 2^12 times the noise: float32 rounds to 2^-12.
        counterpart=Counterpart(
            "Euler", "EulerDiscreteScheduler", zero_snr_tolerance=1e-3, starts_at_sigma=True
        ),
    ),
    "euler_ancestral": Sampler(ddim_step, stochastic=True),
    "heun": Sampler(heun_step, evaluations_per_step=2),
    "dpmpp_2m": Sampler(
        dpmpp_2m_step,
        is_multistep=True,
        counterpart=Counterpart("DPM++ 2M", "DPMSolverMultistepScheduler"),
    ),
}
if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]


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

    `noise(step)` is asked for where `Sampler.fresh_noise` of eta is above 0; it must depend on the
    step only, so that a run in two parts equals an unbroken one.
    """
    check_sampler(sampler, eta)
    stop = grid.num_steps if stop is None else stop
    if not 0 <= state.step <= stop <= grid.num_steps:
        raise ValueError(f"cannot run from level {state.step} to {stop} of {grid.num_steps}")
    chosen = SAMPLERS[sampler]
    fresh = chosen.fresh_noise(eta)
    if fresh > 0 and noise is None:
        raise ValueError(f"{sampler} with eta {fresh} draws noise: pass noise=")
    while state.step < stop:
        state = chosen.step(denoise, grid, state, fresh, noise)
        if on_step is not None:
            on_step(state)
    return state


def check_sampler(sampler: str, eta: float | None = None) -> None:
    """Raises UserError for an unknown sampler, or an eta that it does not take."""
    if sampler not in SAMPLERS:
        near = get_close_matches(sampler, SAMPLERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}{hint}")
    if eta is not None and not SAMPLERS[sampler].takes_eta:
        takers = " or ".join(name for name, kind in SAMPLERS.items() if kind.takes_eta)
        raise UserError(f"eta={eta} goes with sampler={takers} alone, not with {sampler}")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"eta={eta} must lie in 0..1: 0 is deterministic, 1 ancestral")
