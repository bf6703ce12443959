"""The samplers against a Gaussian whose answer is known.

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
from torch.testing import assert_close

from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.samplers import SAMPLERS, run
from tests.toy_denoisers import (
    MEAN,
    SD,
    STD,
    ZERO_SNR,
    ideal_gaussian,
    levels,
    noise_of,
    step_noise,
)


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
