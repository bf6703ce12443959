"""Denoisers whose answers are known or cheap, for the tests of the samplers."""

import math

import torch

from blackpoint.sampling.grid import Prediction, SampleState, SamplingGrid
from blackpoint.sampling.noise import initial_noise, step_seeds
from blackpoint.sampling.prediction import to_eps, to_x0
from blackpoint.sampling.samplers import run
from blackpoint.sampling.schedule import NoiseSchedule

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


def step_noise(seeds, step, shape):
    """Draws the fresh noise of a sampling step, one per seed."""
    return initial_noise(step_seeds(seeds, step), shape)


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
