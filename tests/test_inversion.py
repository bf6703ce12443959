"""Inversion: round trips, orders and bounds that are known."""

import math

import pytest
import torch
from torch.testing import assert_close

from blackpoint.sampling.grid import Prediction, SampleState, SamplingGrid
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import run
from tests.toy_denoisers import SD, STD, ZERO_SNR, ideal_gaussian, noise_of, reader


def grid_of(num_steps, schedule=ZERO_SNR):
    return SamplingGrid.of(schedule, schedule.trailing_timesteps(num_steps))


def round_trip(inverter, num_steps, denoise=None):
    """The relative error of each noise after generation and inversion, and the inversion."""
    x, denoise = noise_of(4).double(), denoise or reader(ZERO_SNR)
    clean = run("ddim", denoise, grid_of(num_steps), SampleState(x)).x
    found = invert(denoise, grid_of(num_steps), clean, inverter)
    return (found.x - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1), found


@pytest.mark.parametrize("model_time", ["noisy", "clean"])
def test_the_error_of_the_naive_inverse_falls_with_the_steps(model_time):
    """Its order is near 3/4: even timesteps are coarse in sigma where it is small."""
    inverter = Inverter("ddim", model_time=model_time)
    denoise = ideal_gaussian(ZERO_SNR)
    coarse, fine = (round_trip(inverter, n, denoise)[0].mean().item() for n in (200, 1000))
    assert 0.65 < math.log(coarse / fine) / math.log(5) < 1.05


@pytest.mark.parametrize("method", ["fixed_point", "anderson", "renoise"])
def test_iterations_bring_the_noise_back(method):
    errors = []
    for count in (3, 6, 12, 24):
        error, found = round_trip(Inverter(method, num_iterations=count), 10)
        errors.append(error.max().item())
        assert (found.contraction < 1).all()
        assert found.residual.shape == found.contraction.shape == (10, 4)
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < (1e-2 if method == "renoise" else 1e-6)


def test_anderson_needs_fewer_evaluations():
    plain, faster = (
        round_trip(Inverter(method, num_iterations=6), 25)[0].max()
        for method in ("fixed_point", "anderson")
    )
    assert faster < 0.1 * plain


def test_the_fixed_point_contracts_by_its_bound_on_a_gaussian():
    """x0(z) of a Gaussian is linear, so every iteration shrinks the change by what the form has."""
    num_steps, denoise = 10, ideal_gaussian(ZERO_SNR)
    grid = grid_of(num_steps)
    _, found = round_trip(Inverter("fixed_point", num_iterations=4), num_steps, denoise)
    for place, step in enumerate(reversed(range(num_steps))):
        (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(step), grid.level(step + 1)
        sine = sigma_t * alpha_u - alpha_t * sigma_u
        slope = alpha_t * STD**2 / (alpha_t**2 * STD**2 + sigma_t**2)  # of x0(z)
        if sigma_u >= alpha_u:
            bound = abs(sine / sigma_u * slope)
        else:
            bound = abs(sine / alpha_u * (1 - alpha_t * slope) / sigma_t)  # of eps(z)
        if bound > 1e-4:
            expected = torch.full((4,), bound, dtype=torch.float64)
            assert_close(found.contraction[place], expected, rtol=1e-3, atol=0)


def test_a_network_of_eps_is_inverted_in_its_own_form():
    """Its x0 is divided by alpha: in the x0 form the iteration contracts less where noise is."""
    denoise, schedule = reader(SD, "epsilon"), SD
    grid, x = grid_of(10, schedule), noise_of(2).double()
    clean = run("ddim", denoise, grid, SampleState(x)).x
    plain, own = (
        invert(denoise, grid, clean, Inverter(num_iterations=4, predicts_eps=flag))
        for flag in (False, True)
    )
    assert (own.x - x).norm() < (plain.x - x).norm() and (own.contraction < 1).all()
    assert (own.contraction[-3:] < 0.8 * plain.contraction[-3:]).all()
    assert Inverter().of(Process(SD, "epsilon")).predicts_eps
    assert not Inverter().of(Process(ZERO_SNR)).predicts_eps


def test_a_network_too_steep_is_said_not_to_converge():
    def steep(x, t):
        gentle = reader(ZERO_SNR)(x, t)
        return Prediction(20 * torch.sin(5 * x), gentle.eps)

    clean = noise_of(2).double()
    found = invert(steep, grid_of(4), clean, Inverter("fixed_point", num_iterations=8))
    assert (found.contraction >= 1).any(dim=0).all()
    assert (found.residual[1:] > 1e-3).any()


@pytest.mark.parametrize("method", ["ddim", "fixed_point", "anderson", "renoise"])
def test_an_image_inverts_alone_as_in_a_batch(method):
    def own(x, t):  # mixes no images
        return reader(ZERO_SNR, network=lambda y, s: torch.tanh(y + math.cos(s / 100)))(x, t)

    clean, grid = noise_of(3).double(), grid_of(6)
    together = invert(own, grid, clean, Inverter(method)).x
    alone = torch.cat([invert(own, grid, row[None], Inverter(method)).x for row in clean])
    assert_close(together, alone, rtol=0, atol=1e-9)


def test_part_of_the_way_back_ends_at_its_level():
    denoise, grid, x = reader(ZERO_SNR), grid_of(10), noise_of(2).double()
    middle = run("ddim", denoise, grid, SampleState(x), 4).x
    found = invert(denoise, grid, middle, Inverter(num_iterations=30), start=4)
    assert found.residual.shape == (4, 2)
    assert_close(found.x, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_evaluations_are_those_that_the_network_sees(count):
    for method in ("ddim", "fixed_point", "anderson", "renoise"):
        inverter = Inverter(method, num_iterations=count)
        calls = 0

        def counting(x, t):
            nonlocal calls
            calls += 1
            return reader(ZERO_SNR)(x, t)

        invert(counting, grid_of(7), noise_of(1), inverter)
        assert calls == 7 * inverter.evaluations


def test_a_level_without_noise_above_it_is_refused():
    with pytest.raises(ValueError, match="cannot invert from level 5 of 4"):
        invert(reader(ZERO_SNR), grid_of(4), noise_of(1), Inverter(), start=5)
