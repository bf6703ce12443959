"""Trajectories of the samplers equal those of diffusers' schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch.testing import assert_close

from blackpoint.sampling.samplers import SAMPLERS
from tests.toy_denoisers import (
    SD,
    STAND_IN,
    ZERO_SNR,
    levels,
    noise_of,
    reader,
    toy_network,
)


def diffusers_levels(scheduler, num_steps, noise):
    """The latents that a diffusers loop visits, in its own scaling turned to x_t."""
    scheduler.set_timesteps(num_steps)
    x = noise * scheduler.init_noise_sigma
    visited = []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        visited.append(seen if isinstance(scheduler, EulerDiscreteScheduler) else x)
        x = scheduler.step(toy_network(seen, t.item()), t, x).prev_sample
        assert i < num_steps
    return torch.stack([*visited, x])


def step_noise(step):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1000 + step))


def ancestral_levels(scheduler, num_steps, network):
    """As `diffusers_levels`, with the noise of `step_noise`; they keep x / alpha."""
    scheduler.set_timesteps(num_steps)
    x = noise_of() * scheduler.init_noise_sigma
    visited = []
    for step, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        visited.append(seen)
        generator = torch.Generator().manual_seed(1000 + step)
        x = scheduler.step(network(seen, t.item()), t, x, generator=generator).prev_sample
    return torch.stack([*visited, x])


def config(zero_snr, **entries):
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": zero_snr,
        **entries,
    }


@pytest.mark.parametrize("num_steps", [1, 2, 5, 25, 50])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_trajectory_equals_diffusers(num_steps, zero_snr):
    """Numbers of steps that divide T: elsewhere diffusers' DDIM leaves its own timestep list."""
    scheduler = DDIMScheduler(**config(zero_snr, clip_sample=False))
    schedule = ZERO_SNR if zero_snr else SD
    theirs = diffusers_levels(scheduler, num_steps, noise_of())
    ours = levels("ddim", schedule, schedule.trailing_timesteps(num_steps), noise_of())
    assert_close(ours, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 25])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_euler_trajectory_equals_diffusers(num_steps, zero_snr):
    """With diffusers' stand-in for alpha_bar = 0. Unrescaled, diffusers starts at sigma_T noise.

    diffusers keeps x / alpha, so the stand-in starts at 2^12 noise, |noise| < 4: float32 rounds it
    to 2^-24 2^12 4 = 1e-3 once a step of the first three, and half of the values to far less.
    """
    scheduler = EulerDiscreteScheduler(**config(zero_snr))
    schedule = ZERO_SNR.with_terminal_alpha_bar(STAND_IN) if zero_snr else SD
    theirs = diffusers_levels(scheduler, num_steps, noise_of())
    start = noise_of() * schedule.sigma[-1].item()
    ours = levels("euler", schedule, schedule.trailing_timesteps(num_steps), start)
    assert_close(ours, theirs, rtol=0, atol=3e-3 if zero_snr else 3e-5)
    assert (ours - theirs).abs().median() < 3e-5


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 25])
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
def test_ddim_of_eta_1_is_diffusers_ancestral_euler(sampler, prediction_type, zero_snr, num_steps):
    """With the same noise; SDXL-Turbo is sampled so, epsilon, in 1 to 4 steps.

    In y = x / alpha and s = sigma / alpha, eta sigma_u / sigma_t sqrt(1 - alpha_t^2 / alpha_u^2) is
    alpha_u times their sigma_up = s_u sqrt(1 - s_u^2 / s_t^2). The start, and the tolerance at zero
    terminal SNR, are those of Euler above; latents of epsilon grow to 40, hence the relative one.
    """
    scheduler = EulerAncestralDiscreteScheduler(**config(zero_snr, prediction_type=prediction_type))
    schedule = ZERO_SNR.with_terminal_alpha_bar(STAND_IN) if zero_snr else SD

    def network(x, t):
        return 0.5 * toy_network(x, t)

    theirs = ancestral_levels(scheduler, num_steps, network)
    timesteps = schedule.trailing_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == timesteps
    options = {"eta": 1.0} if SAMPLERS[sampler].takes_eta else {}
    start = noise_of() * schedule.sigma[-1].item()
    denoise = reader(schedule, prediction_type, network)
    ours = levels(sampler, schedule, timesteps, start, denoise, noise=step_noise, **options)
    assert_close(ours, theirs, rtol=1e-5, atol=3e-3 if zero_snr else 3e-5)
    assert (ours - theirs).abs().median() < 3e-5


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 25, 50])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_dpmpp_2m_trajectory_equals_diffusers(num_steps, zero_snr):
    scheduler = DPMSolverMultistepScheduler(**config(zero_snr))
    schedule = ZERO_SNR.with_terminal_alpha_bar(STAND_IN) if zero_snr else SD
    theirs = diffusers_levels(scheduler, num_steps, noise_of())
    ours = levels("dpmpp_2m", schedule, schedule.trailing_timesteps(num_steps), noise_of())
    assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_epsilon_trajectory_equals_diffusers():
    entries = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1}
    scheduler = DDIMScheduler(**config(False, clip_sample=False, **entries))
    scheduler.set_timesteps(10)
    x = noise_of()
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * toy_network(x, t.item()), t, x).prev_sample
    denoise = reader(SD, "epsilon", lambda x, t: 0.5 * toy_network(x, t))
    ours = levels("ddim", SD, SD.leading_timesteps(10), noise_of(), denoise)[-1]
    assert_close(ours, x, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("sampler", "bound"), [("euler", 5e-2), ("dpmpp_2m", 2.5e-3)])
def test_exact_zero_stays_close_to_the_stand_in(sampler, bound):
    """What diffusers' stand-in of 2^-24 costs at 25 steps is small, and ours is finite without."""
    steps = ZERO_SNR.trailing_timesteps(25)
    stand_in = ZERO_SNR.with_terminal_alpha_bar(STAND_IN)
    exact = levels(sampler, ZERO_SNR, steps, noise_of())
    theirs = levels(sampler, stand_in, steps, noise_of())
    assert torch.isfinite(exact).all()
    assert (exact - theirs).abs().max() < bound
