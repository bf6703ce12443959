"""Laws of the samplers: diffusers' trajectories, a Gaussian whose answer is known, runs in parts.

The Gaussian. Data N(m, s^2) in each coordinate, so x_t ~ N(alpha m, D) with
D = alpha^2 s^2 + sigma^2, and the ideal reading is linear:

    E[x0 | x_t] = m + k (x_t - alpha m),   k = alpha s^2 / D.

Every sampler is then an affine map of its noise. With u = x_t - alpha m and the vector
w_t = (alpha_t s, sigma_t), |w_t|^2 = D_t, a DDIM step from t to t' multiplies u by

    (alpha alpha' s^2 + sigma sigma') / D = |w'| / |w| cos(delta),   delta = angle(w, w').

At zero terminal SNR w starts at (0, 1) and ends at (s, 0), so the mean comes out as m exactly and
the deviation as s prod cos(delta_i). The delta_i add up to pi / 2, hence the relative error

    1 - prod cos(delta_i) <= sum delta_i^2 / 2 <= (pi / 4) max delta_i,

which is first order and always on the narrow side.

The other samplers have recursions of the same kind (see `affine_map`).
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch.testing import assert_close

from sampling.errors import UserError
from sampling.noise import derive_seed, initial_noise, step_noise
from sampling.prediction import to_eps, to_x0, training_target
from sampling.samplers import (
    SAMPLERS,
    Prediction,
    SampleState,
    SamplingGrid,
    check_sampler,
    renoise,
    run,
)
from sampling.schedule import NoiseSchedule

SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
STAND_IN = 2**-24
MEAN, STD = 0.8, 0.4


def toy_network(x, t):
    """A smooth nonlinear network that mixes positions, looks at t and is not symmetric."""
    return torch.tanh(0.8 * x - 0.4 * x.roll(1, -1) + math.cos(t / 150)) + 0.3 * x.roll(1, 1)


def reader(schedule, prediction_type="v_prediction", network=toy_network):
    def denoise(x, t):
        alpha, sigma = schedule.at(torch.tensor([t]))
        out = network(x, t)
        return Prediction(
            to_x0(prediction_type, out, x, alpha, sigma),
            to_eps(prediction_type, out, x, alpha, sigma),
        )

    return denoise


def ideal_gaussian(schedule):
    def denoise(x, t):
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def noise_of(num_images=2, shape=(4, 8, 8)):
    return initial_noise(range(num_images), shape)


def levels(sampler, schedule, timesteps, x, denoise=None, **options):
    """The latents of every level that a run visits."""
    visited = [x]
    run(
        sampler,
        denoise or reader(schedule),
        SamplingGrid.of(schedule, timesteps),
        SampleState(x),
        on_step=lambda state: visited.append(state.x),
        **options,
    )
    return torch.stack(visited)


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
    to 2^-24 2^12 4 = 1e-3 once a step of the first few, and half of the values to far less.
    """
    scheduler = EulerDiscreteScheduler(**config(zero_snr))
    schedule = ZERO_SNR.with_terminal_alpha_bar(STAND_IN) if zero_snr else SD
    theirs = diffusers_levels(scheduler, num_steps, noise_of())
    start = noise_of() * schedule.sigma[-1].item()
    ours = levels("euler", schedule, schedule.trailing_timesteps(num_steps), start)
    assert_close(ours, theirs, rtol=0, atol=1e-3 if zero_snr else 3e-5)
    assert (ours - theirs).abs().median() < 2e-5


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


def affine_map(sampler, schedule, timesteps, eta=0.0):
    """Follows x = mean + gain * start + fresh noise of variance `fresh` through a run, by hand.

    ddim      u' = (alpha' k + c (1 - alpha k) / sigma) u + eta tau z, c^2 = sigma'^2 - (eta tau)^2,
              tau^2 = (sigma' / sigma)^2 (1 - alpha^2 / alpha'^2)
    heun      x' = x + h / 2 (v(x) + v'(x + h v(x))), v = a x + b, h the change of angle
    dpmpp_2m  u' = r u + (alpha' - alpha r) ((1 + q) k u - q k_before u_before), r = sigma' / sigma,
              q = h / (2 h_before); q = 0 on the first step, after alpha = 0 and on the last step
    """
    alpha = [*schedule.alpha[timesteps].tolist(), 1.0]
    sigma = [*schedule.sigma[timesteps].tolist(), 0.0]
    variance = [a**2 * STD**2 + s**2 for a, s in zip(alpha, sigma, strict=True)]
    k = [a * STD**2 / d for a, d in zip(alpha, variance, strict=True)]

    def velocity(i):  # v = a x + b
        slope = (1 - alpha[i] * k[i]) / sigma[i] * alpha[i] - sigma[i] * k[i]
        return slope, -sigma[i] * MEAN - slope * alpha[i] * MEAN

    gain, mean, fresh, gains = 1.0, 0.0, 0.0, []
    for i in range(len(timesteps)):
        gains.append(gain)
        last = i + 1 == len(timesteps)
        if sampler == "heun" and not last:
            h = math.atan2(sigma[i + 1], alpha[i + 1]) - math.atan2(sigma[i], alpha[i])
            (a, b), (a_next, b_next) = velocity(i), velocity(i + 1)
            factor = 1 + h / 2 * (a + a_next * (1 + h * a))
            mean = factor * mean + h / 2 * (b + a_next * h * b + b_next)
            gain *= factor
            continue
        shift = alpha[i] * MEAN
        if sampler == "heun":
            factor, added = k[i], 0.0
        elif sampler == "dpmpp_2m":
            ratio = sigma[i + 1] / sigma[i]
            rest = alpha[i + 1] - alpha[i] * ratio
            q = 0.0
            if i > 0 and not last and alpha[i - 1] > 0:
                lam = [math.log(alpha[j] / sigma[j]) for j in (i - 1, i, i + 1)]
                q = (lam[2] - lam[1]) / (2 * (lam[1] - lam[0]))
            before = k[i - 1] * gains[i - 1] / gain if q else 0.0
            factor, added = ratio + rest * ((1 + q) * k[i] - q * before), 0.0
        else:
            tau = sigma[i + 1] / sigma[i] * math.sqrt(max(0, 1 - (alpha[i] / alpha[i + 1]) ** 2))
            c = math.sqrt(max(0, sigma[i + 1] ** 2 - (eta * tau) ** 2))
            factor = alpha[i + 1] * k[i] + c * (1 - alpha[i] * k[i]) / sigma[i]
            added = (eta * tau) ** 2
        gain, fresh = factor * gain, factor**2 * fresh + added
        mean = alpha[i + 1] * MEAN + factor * (mean - shift)
    return mean, gain, fresh


@pytest.mark.parametrize("num_steps", [1, 2, 5, 25])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_deterministic_samplers_are_the_affine_map_derived_for_a_gaussian(sampler, num_steps):
    steps = ZERO_SNR.trailing_timesteps(num_steps)
    noise = noise_of().double()
    x0 = levels(sampler, ZERO_SNR, steps, noise, ideal_gaussian(ZERO_SNR))[-1]
    mean, gain, _ = affine_map(sampler, ZERO_SNR, steps)
    assert_close(x0, mean + gain * noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [5, 25, 100])
def test_samplers_recover_mean_and_variance_of_a_gaussian(sampler, num_steps):
    """Sample statistics against the derived map, within 5 standard errors of 20,480 values."""
    shape = (4, 32, 32)
    steps = ZERO_SNR.trailing_timesteps(num_steps)
    noise = noise_of(5, shape)
    x0 = levels(
        sampler,
        ZERO_SNR,
        steps,
        noise,
        ideal_gaussian(ZERO_SNR),
        noise=lambda step: step_noise(range(5), step, shape),
    )[-1]
    eta = 1.0 if sampler == "euler_ancestral" else 0.0
    mean, gain, fresh = affine_map(sampler, ZERO_SNR, steps, eta)
    std = math.sqrt(gain**2 + fresh)
    count = x0.numel()
    assert abs(x0.mean().item() - mean) < 5 * std / math.sqrt(count)
    assert abs(x0.std().item() / std - 1) < 5 / math.sqrt(2 * count)


@pytest.mark.parametrize("num_steps", [5, 25, 100, 1000])
def test_discretisation_error_of_ddim_is_within_its_bound(num_steps):
    steps = ZERO_SNR.trailing_timesteps(num_steps)
    mean, gain, _ = affine_map("ddim", ZERO_SNR, steps)
    angles = [math.atan2(s, a * STD) for a, s in zip(ZERO_SNR.alpha, ZERO_SNR.sigma, strict=True)]
    path = [*(angles[t] for t in steps), 0.0]
    deltas = [before - after for before, after in zip(path, path[1:], strict=False)]
    assert sum(deltas) == pytest.approx(math.pi / 2)
    assert mean == pytest.approx(MEAN, abs=1e-12)
    assert gain / STD == pytest.approx(math.prod(map(math.cos, deltas)), rel=1e-9)
    error = 1 - gain / STD
    assert 0 < error <= sum(delta**2 for delta in deltas) / 2 <= math.pi / 4 * max(deltas)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
@pytest.mark.parametrize("num_steps", [25, 100, 250, 1000])
def test_second_order_samplers_lose_no_more_than_their_last_step(sampler, num_steps):
    """The last step, to clean data, is one evaluation and so a DDIM step: factor cos(delta).

    With it taken out, what is left of the error at 25 steps is a tenth of DDIM's.
    """
    steps = ZERO_SNR.trailing_timesteps(num_steps)
    alpha, sigma = ZERO_SNR.alpha[steps[-1]].item(), ZERO_SNR.sigma[steps[-1]].item()
    last = math.cos(math.atan2(sigma, alpha * STD))
    mean, gain, _ = affine_map(sampler, ZERO_SNR, steps)
    _, ddim_gain, _ = affine_map("ddim", ZERO_SNR, steps)
    left, ddim_left = abs(gain / STD / last - 1), abs(ddim_gain / STD / last - 1)
    assert left < ddim_left / (10 if num_steps == 25 else 5)
    assert abs(mean - MEAN) < left * STD if sampler == "heun" else mean == pytest.approx(MEAN)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_error_in_the_deviation_falls_with_the_steps_to_below_a_fiftieth(sampler):
    errors = []
    for num_steps in (25, 100, 250, 1000):
        steps = ZERO_SNR.trailing_timesteps(num_steps)
        eta = 1.0 if sampler == "euler_ancestral" else 0.0
        _, gain, fresh = affine_map(sampler, ZERO_SNR, steps, eta)
        errors.append(1 - math.sqrt(gain**2 + fresh) / STD)
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 0.02


def test_published_schedule_leaks_the_mean_and_the_rescaled_one_does_not():
    """The flaw itself: pure noise is alpha_T m away from what the published schedule ends at."""
    noise = noise_of().double()
    mean, gain, _ = affine_map("ddim", SD, SD.trailing_timesteps(1000))
    assert mean < MEAN - 0.01
    x0 = levels("ddim", SD, SD.trailing_timesteps(1000), noise, ideal_gaussian(SD))[-1]
    assert_close(x0, mean + gain * noise, rtol=0, atol=1e-9)
    assert affine_map("ddim", ZERO_SNR, list(range(999, -1, -1)))[0] == pytest.approx(MEAN)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order):
    """Halving the steps from level 0 to timestep 199 divides the error by 2^order.

    The last step to clean data is left out: it is first order for every sampler. The exact flow
    from T-1 to t maps noise z to alpha_t m + sqrt(D_t) z.
    """
    alpha, sigma = ZERO_SNR.alpha[199].item(), ZERO_SNR.sigma[199].item()
    noise = noise_of().double()
    exact = alpha * MEAN + math.sqrt(alpha**2 * STD**2 + sigma**2) * noise
    errors = []
    for stride in (100, 50, 25):
        timesteps = list(range(999, 198, -stride))
        state = run(
            sampler,
            ideal_gaussian(ZERO_SNR),
            SamplingGrid.of(ZERO_SNR, timesteps),
            SampleState(noise),
            stop=len(timesteps) - 1,
        )
        errors.append((state.x - exact).abs().max().item())
    rates = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(abs(rate - order) < 0.35 for rate in rates), rates


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


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 4), ("dpmpp_2m", 4), ("heun", 7)])
def test_number_of_evaluations_is_the_stated_one(sampler, calls):
    visited = []

    def denoise(x, t):
        visited.append(t)
        return reader(ZERO_SNR)(x, t)

    levels(sampler, ZERO_SNR, ZERO_SNR.trailing_timesteps(4), noise_of(), denoise)
    assert len(visited) == calls


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
