"""The published weight w(t) of a timestep, for an error in v; free of torch, for configs name it.

    eps error = alpha (v error),   x0 error = sigma (v error)

so a weight W published for an eps error is w = alpha^2 W here, one for an x0 error w = sigma^2 W.
Only alpha^2, sigma^2 and SNR = alpha^2 / sigma^2 occur; sigma / alpha is infinite at zero SNR. The
floor, and the weight for an error in the network's own output, are in train/weighting.py.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from blackpoint.sampling.schedule import NoiseSchedule
    from blackpoint.train.loss_config import LossConfig


def min_snr(schedule: "NoiseSchedule", gamma: float) -> "Tensor":
    """Returns min(SNR, gamma) / (SNR + 1).

    For an x0 error that is min(SNR, gamma), for eps min(SNR, gamma) / SNR (Hang et al. 2023).
    """
    return schedule.snr.clamp(max=gamma) / (schedule.snr + 1)


def soft_min_snr(schedule: "NoiseSchedule", gamma: float) -> "Tensor":
    """Returns SNR gamma / ((SNR + gamma) (SNR + 1)).

    For an x0 error that is 1 / (1 / SNR + 1 / gamma) (Crowson et al. 2024, HDiT, gamma 4). It
    equals the sigmoid weight of bias log(gamma).
    """
    snr = schedule.snr
    return snr * gamma / ((snr + gamma) * (snr + 1))


def p2(schedule: "NoiseSchedule", k: float, gamma: float) -> "Tensor":
    """Returns alpha^2 / (k + SNR)^gamma.

    For an eps error that is 1 / (k + SNR)^gamma (Choi et al. 2022, P2).
    """
    return schedule.alpha_bar / (k + schedule.snr) ** gamma


def sigmoid(schedule: "NoiseSchedule", bias: float) -> "Tensor":
    """Returns alpha^2 sigmoid(bias - log SNR), written as alpha^2 / (1 + SNR exp(-bias)).

    For an eps error that is sigmoid(bias - log SNR) (Kingma and Gao 2023; Hoogeboom et al. 2024,
    SiD2). Their factor d log SNR / dt, infinite at zero SNR, is left out: t is drawn uniformly.
    """
    return schedule.alpha_bar / (1 + schedule.snr * math.exp(-bias))


WEIGHTS: dict[str, Callable[["NoiseSchedule", "LossConfig"], "Tensor"]] = {
    "uniform": lambda schedule, loss: schedule.alpha_bar.new_ones(schedule.num_steps),
    "min_snr": lambda schedule, loss: min_snr(schedule, loss.snr_gamma),
    "soft_min_snr": lambda schedule, loss: soft_min_snr(schedule, loss.snr_gamma),
    "p2": lambda schedule, loss: p2(schedule, loss.p2_k, loss.p2_gamma),
    "sigmoid": lambda schedule, loss: sigmoid(schedule, loss.sigmoid_bias),
}
"""The functions of loss.weighting: (T,) float64, from the schedule and the config of the loss."""
