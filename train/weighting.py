"""The weight w(t) of every timestep, written for an error in v, in float64.

    eps error = alpha * (v error),   x0 error = sigma * (v error)

so a weight W published for an eps error is w = alpha^2 W here, one for an x0 error w = sigma^2 W,
and w becomes the weight of the network's own output by the same law read backwards. With zero
terminal SNR alpha is 0 at t = T - 1: every published weight but the uniform one is 0 there, on the
one timestep that the rescale adds and that decides an image's mean. Hence a floor at the noisy end,

    max(w, floor) where SNR < 1,   w elsewhere,   floor = min(mean(w) / 3, w at SNR 1)

so that the last timestep learns at a third of the mean pace, whatever the weighting and the shift.
As the floor is at most w at SNR 1, the weight has no step there; a larger floor that is given as a
number makes one. The clean end keeps its published weight: divided by sigma^2, which is 1 - alpha^2
and near 0 there, a floor would be the largest weight of an x0 error.

Only alpha^2, sigma^2 and SNR = alpha^2 / sigma^2 occur; sigma / alpha is infinite at T - 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import PredictionType
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.loss_config import LossConfig

# Of runs whose floor holds everywhere: about a third of min-SNR's mean on SD's rescaled schedule.
FLOOR_EVERYWHERE = 0.1

Weights = Float[Tensor, " T"]


def min_snr(schedule: NoiseSchedule, gamma: float) -> Weights:
    """Returns min(SNR, gamma) / (SNR + 1).

    For an x0 error that is min(SNR, gamma), for eps min(SNR, gamma) / SNR (Hang et al. 2023).
    """
    return schedule.snr.clamp(max=gamma) / (schedule.snr + 1)


def soft_min_snr(schedule: NoiseSchedule, gamma: float) -> Weights:
    """Returns SNR gamma / ((SNR + gamma) (SNR + 1)).

    For an x0 error that is 1 / (1 / SNR + 1 / gamma) (Crowson et al. 2024, HDiT, gamma 4). It
    equals the sigmoid weight of bias log(gamma).
    """
    snr = schedule.snr
    return snr * gamma / ((snr + gamma) * (snr + 1))


def p2(schedule: NoiseSchedule, k: float, gamma: float) -> Weights:
    """Returns alpha^2 / (k + SNR)^gamma.

    For an eps error that is 1 / (k + SNR)^gamma (Choi et al. 2022, P2).
    """
    return schedule.alpha_bar / (k + schedule.snr) ** gamma


def sigmoid(schedule: NoiseSchedule, bias: float) -> Weights:
    """Returns alpha^2 sigmoid(bias - log SNR), written as alpha^2 / (1 + SNR exp(-bias)).

    For an eps error that is sigmoid(bias - log SNR) (Kingma and Gao 2023; Hoogeboom et al. 2024,
    SiD2). Their factor d log SNR / dt, infinite at zero SNR, is left out: t is drawn uniformly.
    """
    return schedule.alpha_bar / (1 + schedule.snr * math.exp(-bias))


def v_weights(loss: LossConfig, schedule: NoiseSchedule) -> Weights:
    """Returns the published weight of `loss.weighting` for an error in v, before the floor."""
    match loss.weighting:
        case "uniform":
            return torch.ones(schedule.num_steps, dtype=torch.float64)
        case "min_snr":
            return min_snr(schedule, loss.snr_gamma)
        case "soft_min_snr":
            return soft_min_snr(schedule, loss.snr_gamma)
        case "p2":
            return p2(schedule, loss.p2_k, loss.p2_gamma)
        case "sigmoid":
            return sigmoid(schedule, loss.sigmoid_bias)
    raise ValueError(f"unknown loss.weighting={loss.weighting!r}")


def floor_of(loss: LossConfig, schedule: NoiseSchedule) -> float:
    """Returns loss.floor or, where it is null, what weighting and schedule need."""
    if loss.floor is not None:
        return loss.floor
    if not schedule.is_zero_terminal_snr:
        return 0.0
    if loss.floor_where == "everywhere":
        return FLOOR_EVERYWHERE
    weights = v_weights(loss, schedule)
    from_snr_1_up = weights[schedule.snr >= 1]
    limit = from_snr_1_up[-1].item() if len(from_snr_1_up) else math.inf
    return min(weights.mean().item() / 3, limit)


def floored_v_weights(loss: LossConfig, schedule: NoiseSchedule) -> Weights:
    """Returns the weight for an error in v with its floor."""
    weights = v_weights(loss, schedule)
    lifted = weights.clamp(min=floor_of(loss, schedule))
    if loss.floor_where == "everywhere":
        return lifted
    return torch.where(schedule.snr < 1, lifted, weights)


def error_per_v_error(prediction_type: PredictionType, schedule: NoiseSchedule) -> Weights:
    """Returns the squared error of the network's output that a squared error of 1 in v makes.

    alpha^2 for epsilon, which is 0 at zero terminal SNR, sigma^2 for sample (x0), 1 for v.
    """
    match prediction_type:
        case "epsilon":
            return schedule.alpha_bar
        case "sample":
            return 1 - schedule.alpha_bar
        case "v_prediction":
            return torch.ones(schedule.num_steps, dtype=torch.float64)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def loss_weights(loss: LossConfig, schedule: NoiseSchedule) -> Weights:
    """Returns the floored weight for an error in the network's own output, (T,) float64.

    `uniform` is 1 for every output type and timestep: lambda_t = 1 in the output's own space.
    Raises UserError where a weight is not finite, as for eps at zero terminal SNR.
    """
    if loss.weighting == "uniform":
        return v_weights(loss, schedule)
    weights = floored_v_weights(loss, schedule) / error_per_v_error(loss.prediction_type, schedule)
    if not torch.isfinite(weights).all():
        raise UserError(
            f"loss.weighting={loss.weighting} with loss.prediction_type={loss.prediction_type}: "
            "the weight must be finite at every timestep, and w / alpha^2, the weight of an eps "
            "error, is not where alpha is 0; use loss.prediction_type=v_prediction or "
            "loss.weighting=uniform"
        )
    return weights


def check_sound(loss: LossConfig, schedule: NoiseSchedule, allow_unsound: bool = False) -> None:
    """Raises UserError for options that defeat zero terminal SNR, unless they are allowed."""
    if (
        loss.prediction_type == "epsilon"
        and max(loss.pool_factors) > 1
        and schedule.is_zero_terminal_snr
    ):
        raise UserError(
            f"loss.pool_factors={loss.pool_factors} with epsilon and zero terminal SNR: an error "
            "in eps is alpha times the one in v, so its means see nothing at the last timestep; "
            "use loss.prediction_type=v_prediction (or sample)"
        )
    reason = _unsound(loss, schedule)
    if reason and not allow_unsound:
        raise UserError(f"{reason}. allow_unsound=true runs it all the same, for a comparison")
    loss_weights(loss, schedule)


def _unsound(loss: LossConfig, schedule: NoiseSchedule) -> str | None:
    if not schedule.is_zero_terminal_snr:
        return None
    if loss.offset_noise:
        return (
            f"loss.offset_noise={loss.offset_noise:g} with zero terminal SNR: it must be 0. It "
            "stands in for the missing black and white by shifting each channel's mean, but the "
            "last timestep is pure noise now, and sampling starts from noise that has no such "
            "shift: training would see another distribution there. Zero terminal SNR already "
            "removes the cause; leave loss.offset_noise out, or set schedule.zero_terminal_snr="
            "false with a base that is not rescaled"
        )
    if v_weights(loss, schedule)[-1] <= 0 and floor_of(loss, schedule) <= 0:
        return (
            f"loss.floor=0 with loss.weighting={loss.weighting} and zero terminal SNR: the weight "
            "must be > 0 at every timestep, and is 0 at the last one, which the rescale adds and "
            "which would never be trained; leave loss.floor out (null: a third of the mean "
            "weight), or set loss.weighting=uniform"
        )
    return None
