"""Inversion: round trips, orders and bounds that are known."""

import math

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.inversion import Inverter, bdia_invert, bdia_resample, bdia_sample, invert
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import Prediction, SampleState, SamplingGrid, run
from tests.toy_denoisers import SD, STD, ZERO_SNR, ideal_gaussian, noise_of, reader

SCHEDULES = {"zero terminal SNR": ZERO_SNR, "SD's own": SD}


def grid_of(num_steps, schedule=ZERO_SNR):
    return SamplingGrid.of(schedule, schedule.trailing_timesteps(num_steps))


def round_trip(inverter, num_steps, denoise=None, x=None):
    """The relative error of each noise after generation and inversion, and the inversion."""
    x, denoise = noise_of(4).double() if x is None else x, denoise or reader(ZERO_SNR)
    clean = run("ddim", denoise, grid_of(num_steps), SampleState(x)).x
    found = invert(denoise, grid_of(num_steps), clean, inverter)
    return (found.x - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1), found


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
# Fifty steps round values up to 4 by 2.4e-7 at most, three times each.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 4e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_bdia_is_undone_exactly(schedule, dtype, limit, num_steps):
    denoise, grid = reader(schedule), grid_of(num_steps, schedule)
    noise = noise_of(3).to(dtype)
    before, clean = bdia_sample(denoise, grid, noise)
    found, first = bdia_invert(denoise, grid, before, clean)
    assert (found - noise).abs().max() < limit
    again_before, again = bdia_resample(denoise, grid, found, first)
    assert (again - clean).abs().max() < limit and (again_before - before).abs().max() < limit


def test_bdia_of_a_real_image_gives_it_back():
    """Whatever the pair, such as an image and its naive inverse, the way back is exact."""
    denoise, grid = reader(ZERO_SNR), grid_of(10)
    clean = noise_of(2).double().tanh()
    before = invert(denoise, grid, clean, Inverter("ddim"), stop=9).x
    noise, first = bdia_invert(denoise, grid, before, clean)
    assert_close(bdia_resample(denoise, grid, noise, first)[1], clean, rtol=0, atol=1e-10)


def test_bdia_with_a_smaller_gamma_lies_between_ddim_and_bdia():
    denoise, grid, x = reader(ZERO_SNR), grid_of(20), noise_of(1).double()
    ddim = run("ddim", denoise, grid, SampleState(x)).x
    distances = [
        (bdia_sample(denoise, grid, x, gamma)[1] - ddim).norm().item() for gamma in (0.01, 0.5, 1.0)
    ]
    assert distances[0] < 0.05 * distances[2] and distances[1] < distances[2]


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
        assert found.converges.all()
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
    assert (own.x - x).norm() < (plain.x - x).norm() and own.converges.all()
    assert (own.contraction[-3:] < 0.8 * plain.contraction[-3:]).all()
    assert Inverter().of(Process(SD, "epsilon")).predicts_eps
    assert not Inverter().of(Process(ZERO_SNR)).predicts_eps


def test_a_network_too_steep_is_said_not_to_converge():
    def steep(x, t):
        gentle = reader(ZERO_SNR)(x, t)
        return Prediction(20 * torch.sin(5 * x), gentle.eps)

    clean = noise_of(2).double()
    found = invert(steep, grid_of(4), clean, Inverter("fixed_point", num_iterations=8))
    assert not found.converges.any()
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
        inverter = Inverter(method, num_iterations=count, num_averaged=1)
        calls = 0

        def counting(x, t):
            nonlocal calls
            calls += 1
            return reader(ZERO_SNR)(x, t)

        invert(counting, grid_of(7), noise_of(1), inverter)
        assert calls == 7 * inverter.evaluations


def test_settings_that_cannot_be_are_refused():
    for settings, message in (
        ({"method": "edict"}, "method=edict"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"method": "renoise", "num_iterations": 2}, "num_averaged=3 is more"),
    ):
        with pytest.raises(UserError, match=message):
            Inverter(**settings)
    with pytest.raises(UserError, match="gamma=0"):
        bdia_sample(reader(ZERO_SNR), grid_of(2), noise_of(1), 0.0)
    with pytest.raises(ValueError, match="cannot invert from level 2 to 3"):
        invert(reader(ZERO_SNR), grid_of(4), noise_of(1), Inverter(), start=2, stop=3)
