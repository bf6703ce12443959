"""Laws of the samplers: finite at zero terminal SNR, runs in parts, an image alone or batched."""

import math

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import Prediction, SampleState, SamplingGrid, renoise
from blackpoint.sampling.noise import derive_seed, initial_noise
from blackpoint.sampling.prediction import training_target
from blackpoint.sampling.samplers import SAMPLERS, check_sampler, run
from tests.toy_denoisers import (
    MEAN,
    STD,
    ZERO_SNR,
    levels,
    noise_of,
    reader,
    step_noise,
    toy_network,
)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 250])
def test_every_sampler_is_finite_at_zero_terminal_snr(sampler, num_steps):
    x = noise_of(1, (4, 2, 2))
    steps = ZERO_SNR.trailing_timesteps(num_steps)
    visited = levels(
        sampler, ZERO_SNR, steps, x, noise=lambda step: step_noise([0], step, x[0].shape)
    )
    assert torch.isfinite(visited).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_first_step_from_pure_noise_reads_data_from_the_network_alone(sampler):
    """One step from alpha = 0 gives x0 = -v exactly, whatever the sampler."""
    x = noise_of()
    expected = -toy_network(x, 999)
    x0 = levels(sampler, ZERO_SNR, [999], x, noise=lambda step: x)[-1]
    assert_close(x0, expected, rtol=0, atol=0)


def test_euler_is_ddim_and_euler_ancestral_is_ddim_with_eta_1():
    steps = ZERO_SNR.trailing_timesteps(7)
    fresh = {"noise": lambda step: step_noise([0, 1], step, (4, 8, 8))}
    ddim = levels("ddim", ZERO_SNR, steps, noise_of())
    assert_close(levels("euler", ZERO_SNR, steps, noise_of()), ddim, rtol=0, atol=0)
    ancestral = levels("ddim", ZERO_SNR, steps, noise_of(), eta=1.0, **fresh)
    euler_ancestral = levels("euler_ancestral", ZERO_SNR, steps, noise_of(), **fresh)
    assert_close(euler_ancestral, ancestral, rtol=0, atol=0)
    assert (ancestral - ddim).abs().max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_run_in_two_parts_equals_an_unbroken_run(sampler, stop):
    grid = SamplingGrid.of(ZERO_SNR, ZERO_SNR.trailing_timesteps(7))
    fresh = {"noise": lambda step: step_noise([0, 1], step, (4, 8, 8))}
    whole = run(sampler, reader(ZERO_SNR), grid, SampleState(noise_of()), **fresh)
    part = run(sampler, reader(ZERO_SNR), grid, SampleState(noise_of()), stop=stop, **fresh)
    assert part.step == stop
    both = run(sampler, reader(ZERO_SNR), grid, part, **fresh)
    assert_close(both.x, whole.x, rtol=0, atol=0)
    assert whole.step == 7


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_alone_and_in_a_batch(sampler):
    grid = SamplingGrid.of(ZERO_SNR, ZERO_SNR.trailing_timesteps(5))
    seeds = [3, 1, 2]

    def sample(seeds):
        x = initial_noise(seeds, (4, 8, 8))
        noise = {"noise": lambda step: step_noise(seeds, step, (4, 8, 8))}
        return run(sampler, reader(ZERO_SNR), grid, SampleState(x), **noise).x

    whole = sample(seeds)
    for row, seed in enumerate(seeds):
        assert_close(sample([seed])[0], whole[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_asks_the_network_and_draws_noise_as_it_declares(sampler):
    declared, visited, drawn = SAMPLERS[sampler], [], []

    def denoise(x, t):
        visited.append(t)
        return reader(ZERO_SNR)(x, t)

    def noise(step):
        drawn.append(step)
        return step_noise([0, 1], step, (4, 8, 8))

    levels(sampler, ZERO_SNR, ZERO_SNR.trailing_timesteps(4), noise_of(), denoise, noise=noise)
    assert len(visited) == 4 + 3 * (declared.evaluations_per_step - 1)
    assert bool(drawn) == declared.stochastic


def test_renoising_follows_the_forward_process():
    """From level b back to a, x0 = m keeps mean alpha_a m and total variance sigma_a^2."""
    grid = SamplingGrid.of(ZERO_SNR, ZERO_SNR.trailing_timesteps(5))
    shape = (4, 64, 64)
    for step, back in ((3, 1), (5, 2), (5, 0), (3, 0), (2, 2), (0, 0)):
        alpha, sigma = grid.level(step)
        x = alpha * MEAN + sigma * initial_noise([1], shape)
        state = renoise(grid, SampleState(x, step, x), back, initial_noise([2], shape))
        assert state.step == back and state.x0 is None
        alpha, sigma = grid.level(back)
        assert abs(state.x.mean().item() - alpha * MEAN) < 5 * sigma / math.sqrt(x.numel())
        assert state.x.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * x.numel()))


def test_target_and_sampler_are_inverse():
    """A network that outputs the training target of one x0 makes every sampler return that x0."""
    x0 = noise_of(1)

    def perfect(prediction_type):
        def network(x, t):
            alpha, sigma = ZERO_SNR.at(torch.tensor([t]))
            return training_target(prediction_type, x0, (x - alpha * x0) / sigma, alpha, sigma)

        return network

    for sampler in SAMPLERS:
        for prediction_type in ("v_prediction", "sample"):
            denoise = reader(ZERO_SNR, prediction_type, perfect(prediction_type))
            steps = ZERO_SNR.trailing_timesteps(6)
            out = levels(sampler, ZERO_SNR, steps, noise_of(2)[1:], denoise, noise=lambda step: x0)
            assert_close(out[-1], x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "eta", "message"),
    [
        ("dpmpp2m", None, "did you mean dpmpp_2m"),
        ("zzz", None, "not one of ddim"),
        ("heun", 0.5, "eta=0.5 goes with sampler=ddim"),
        ("ddim", 1.5, "eta=1.5 must lie in 0..1"),
    ],
)
def test_wrong_sampler_settings_are_refused(sampler, eta, message):
    with pytest.raises(UserError, match=message):
        check_sampler(sampler, eta)


def test_misuse_of_a_run_is_refused():
    grid = SamplingGrid.of(ZERO_SNR, [999])
    with pytest.raises(ValueError, match="noise"):
        run("euler_ancestral", reader(ZERO_SNR), grid, SampleState(noise_of()))
    with pytest.raises(ValueError, match="level 1 to 0"):
        run("ddim", reader(ZERO_SNR), grid, SampleState(noise_of(), step=1), stop=0)
    with pytest.raises(ValueError, match="re-noise"):
        renoise(grid, SampleState(noise_of(), step=0), 1, noise_of())


def test_seed_is_the_latent_of_a_cpu_generator():
    noise = initial_noise([5, 9], (4, 3, 2))
    for row, seed in enumerate((5, 9)):
        theirs = torch.randn(4, 3, 2, generator=torch.Generator("cpu").manual_seed(seed))
        assert_close(noise[row], theirs, rtol=0, atol=0)


def test_derived_seeds_are_distinct_stable_and_in_range():
    seeds = [derive_seed(run, "step", step) for run in range(30) for step in range(30)]
    assert len(set(seeds)) == 900 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert (
        len({derive_seed("1", "a"), derive_seed(1, "a"), derive_seed("1a"), derive_seed("a", 1)})
        == 4
    )


def straight(num_steps=6):
    """Flow matching, (1 - t, t), and the ideal denoiser of pixels N(MEAN, STD^2) on it."""
    sigma = tuple(1 - step / num_steps for step in range(num_steps + 1))
    grid = SamplingGrid(tuple(range(num_steps)), tuple(1 - s for s in sigma), sigma)

    def denoise(x, step):
        alpha, sigma = grid.level(step)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return grid, denoise


def test_ddim_on_a_straight_path_is_euler():
    """x_u = x_t + (u - t) (eps - x0)."""
    grid, denoise = straight()
    x = noise_of()
    for step in range(grid.num_steps):
        x0, eps = denoise(x, step)
        after = run("ddim", denoise, grid, SampleState(x, step), step + 1).x
        x = x + (grid.sigma[step + 1] - grid.sigma[step]) * (eps - x0)
        assert_close(after, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [400])
def test_every_sampler_arrives_at_the_data_on_a_straight_path(sampler, num_steps):
    """Mean and deviation of 32,768 pixels, to 5 standard errors and some 1/S of the steps."""
    grid, denoise = straight(num_steps)
    start = initial_noise([1, 2], (4, 64, 64))
    noise = {"noise": lambda step: step_noise([1, 2], step, (4, 64, 64))}
    out = run(sampler, denoise, grid, SampleState(start), **noise).x
    assert abs(out.mean().item() - MEAN) < 5 * STD / math.sqrt(out.numel()) + 1 / num_steps
    assert abs(out.std().item() / STD - 1) < 5 / math.sqrt(2 * out.numel()) + 2 / num_steps


def test_step_noise_of_any_path_is_that_of_the_variance_preserving_one():
    """The posterior does not see a rescaling of x: both paths, at equal SNR, draw the same images.

    eta 1; levels divided by rho = sqrt(alpha^2 + sigma^2) are variance preserving.
    """
    grid, denoise = straight()
    rho = [math.hypot(*grid.level(step)) for step in range(grid.num_steps + 1)]
    scaled = SamplingGrid(
        grid.timesteps,
        tuple(a / r for a, r in zip(grid.alpha, rho, strict=True)),
        tuple(s / r for s, r in zip(grid.sigma, rho, strict=True)),
    )
    noise = {"noise": lambda step: step_noise([0, 1], step, (4, 8, 8)), "eta": 1.0}
    ours = run("ddim", denoise, grid, SampleState(noise_of()), **noise).x
    theirs = run(
        "ddim", lambda x, t: denoise(rho[t] * x, t), scaled, SampleState(noise_of()), **noise
    ).x
    assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_step_noise_of_diffusion_is_the_published_formula():
    """s / (sigma_u / sigma_t) = sqrt(1 - alpha_t^2 / alpha_u^2), to double's rounding."""
    grid = SamplingGrid.of(ZERO_SNR, ZERO_SNR.trailing_timesteps(50))
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step in range(grid.num_steps - 1):
        (alpha_t, sigma_t), (alpha_u, sigma_u) = grid.level(step), grid.level(step + 1)
        state = SampleState(zero, step)
        nothing = {"denoise": lambda x, t: Prediction(zero, zero), "noise": lambda step: zero + 1}
        fresh = run("ddim", grid=grid, state=state, stop=step + 1, eta=1.0, **nothing).x.item()
        published = sigma_u / sigma_t * math.sqrt(1 - (alpha_t / alpha_u) ** 2)
        assert fresh == pytest.approx(published, rel=1e-12)
