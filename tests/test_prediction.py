"""Laws of the targets and their inverses: what training asks for, the samplers read back."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blackpoint.sampling.prediction import (
    add_noise,
    eps_to_x0,
    to_eps,
    to_x0,
    training_target,
    v_to_eps,
    v_to_x0,
    x0_to_eps,
)
from blackpoint.sampling.schedule import NoiseSchedule

ZERO_SNR = NoiseSchedule.scaled_linear().zero_terminal_snr()
SD = NoiseSchedule.scaled_linear()


def draw(num_images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(num_images, 4, 2, 2, generator=generator)
    eps = torch.randn(num_images, 4, 2, 2, generator=generator)
    return x0, eps


def coefficients(schedule):
    alpha, sigma = schedule.at(torch.arange(schedule.num_steps))
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule", [SD, ZERO_SNR], ids=["sd", "zero_snr"])
def test_v_round_trips_at_every_timestep(schedule):
    x0, eps = draw(1000)
    alpha, sigma = coefficients(schedule)
    x_t = add_noise(x0, eps, alpha, sigma)
    v = training_target("v_prediction", x0, eps, alpha, sigma)
    # Of values up to 8: each of a dozen roundings is 2.4e-7 at most.
    assert_close(to_x0("v_prediction", v, x_t, alpha, sigma), x0, rtol=0, atol=5e-6)
    assert_close(to_eps("v_prediction", v, x_t, alpha, sigma), eps, rtol=0, atol=5e-6)


def test_x0_and_eps_round_trip_where_they_are_defined():
    x0, eps = draw(1000)
    alpha, sigma = coefficients(ZERO_SNR)
    x_t = add_noise(x0, eps, alpha, sigma)
    target = training_target("sample", x0, eps, alpha, sigma)
    assert_close(to_x0("sample", target, x_t, alpha, sigma), x0, rtol=0, atol=0)
    # Dividing by sigma_0 = .03 magnifies rounding by 34.
    assert_close(to_eps("sample", target, x_t, alpha, sigma), eps, rtol=0, atol=5e-5)
    alpha, sigma = coefficients(SD)
    x_t = add_noise(x0, eps, alpha, sigma)
    target = training_target("epsilon", x0, eps, alpha, sigma)
    assert_close(to_eps("epsilon", target, x_t, alpha, sigma), eps, rtol=0, atol=0)
    assert_close(to_x0("epsilon", target, x_t, alpha, sigma), x0, rtol=0, atol=5e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_conversions_are_exact_at_the_end_points_and_in_between(alpha):
    """Inputs with few bits and alpha in {1, .5, 0} leave nothing to round in the v conversions.

    At alpha = .5, sigma is irrational, so the law is taken on sigma^2 = .75 in float64.
    """
    alpha = torch.tensor(alpha, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    x0 = torch.tensor([[-2.0, -0.5, 0.0, 1.0, 3.0]], dtype=torch.float64)
    eps = torch.tensor([[1.0, -1.5, 2.0, 0.25, -4.0]], dtype=torch.float64)
    x_t = add_noise(x0, eps, alpha, sigma)
    v = training_target("v_prediction", x0, eps, alpha, sigma)
    atol = 0 if alpha in (0.0, 1.0) else 2e-15
    assert_close(v_to_x0(v, x_t, alpha, sigma), x0, rtol=0, atol=atol)
    assert_close(v_to_eps(v, x_t, alpha, sigma), eps, rtol=0, atol=atol)
    if alpha > 0:
        assert_close(eps_to_x0(eps, x_t, alpha, sigma), x0, rtol=0, atol=4e-15)
    if alpha < 1:
        assert_close(x0_to_eps(x0, x_t, alpha, sigma), eps, rtol=0, atol=4e-15)


def test_terminal_v_is_minus_x0_and_its_reading_ignores_the_noise():
    x0, eps = draw(1)
    alpha, sigma = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert_close(training_target("v_prediction", x0, eps, alpha, sigma), -x0, rtol=0, atol=0)
    for x_t in (eps, 1e4 * eps):
        assert_close(v_to_x0(-x0, x_t, alpha, sigma), x0, rtol=0, atol=0)


def test_target_and_noising_equal_diffusers():
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
    )
    x0, eps = draw(1000)
    t = torch.arange(1000)
    alpha, sigma = coefficients(ZERO_SNR)
    theirs = scheduler.add_noise(x0, eps, t)
    assert_close(add_noise(x0, eps, alpha, sigma), theirs, rtol=0, atol=5e-5)
    theirs = scheduler.get_velocity(x0, eps, t)
    ours = training_target("v_prediction", x0, eps, alpha, sigma)
    assert_close(ours, theirs, rtol=0, atol=5e-5)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(-10, 10), st.floats(-10, 10))
def test_v_rotates_the_pair(alpha, x0, eps):
    """(x_t, v) is (x0, eps) turned by the angle atan2(sigma, alpha): lengths are kept."""
    alpha = torch.tensor(alpha, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    x0, eps = (torch.tensor([[value]], dtype=torch.float64) for value in (x0, eps))
    x_t = add_noise(x0, eps, alpha, sigma)
    v = training_target("v_prediction", x0, eps, alpha, sigma)
    assert_close(x_t**2 + v**2, x0**2 + eps**2, rtol=1e-12, atol=1e-12)
    assert_close(v_to_x0(v, x_t, alpha, sigma), x0, rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [training_target, to_x0, to_eps])
def test_unknown_prediction_type_is_refused(function):
    x0, eps = draw(1)
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(Exception, match="velocity"):
        function("velocity", x0, eps, one, one)
