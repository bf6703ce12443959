"""The weight of every timestep: a published one with its floor, for the network's own output.

Published weights are written for an error in v (train/loss_weights.py), and w becomes the weight of
the network's own output by the same law read backwards. With zero terminal SNR alpha is 0 at
t = T - 1: every published weight but the uniform one is 0 there, on the one timestep that the
rescale adds and that decides an image's mean. Hence a floor at the noisy end,

    max(w, floor) where SNR < 1,   w elsewhere,   floor = min(mean(w) / 3, w at SNR 1)

so that the last timestep learns at a third of the mean pace, whatever the weighting and the shift.
As the floor is at most w at SNR 1, the weight has no step there; a larger floor that is given as a
number makes one. The clean end keeps its published weight: divided by sigma^2, which is 1 - alpha^2
and near 0 there, a floor would be the largest weight of an x0 error.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import PredictionType
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.loss_config import LossConfig
from blackpoint.train.loss_weights import WEIGHTS

# Of runs whose floor holds everywhere: about a third of min-SNR's mean on SD's rescaled schedule.
FLOOR_EVERYWHERE = 0.1

Weights = Float[Tensor, " T"]


def v_weights(loss: LossConfig, schedule: NoiseSchedule) -> Weights:
    """Returns the published weight of `loss.weighting` for an error in v, before the floor."""
    return WEIGHTS[loss.weighting](schedule, loss)


def floor_of(loss: LossConfig, schedule: NoiseSchedule) -> float:
    """Returns loss.floor or, where it is null, the floor for weighting and schedule."""
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
    alpha_bar = schedule.alpha_bar
    return {
        "epsilon": alpha_bar,
        "sample": 1 - alpha_bar,
        "v_prediction": torch.ones_like(alpha_bar),
    }[prediction_type]


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
    reason = _incompatibility(loss, schedule)
    if reason and not allow_unsound:
        raise UserError(f"{reason}; allow_unsound=true runs it all the same, for a comparison")
    loss_weights(loss, schedule)


def _incompatibility(loss: LossConfig, schedule: NoiseSchedule) -> str | None:
    if not schedule.is_zero_terminal_snr:
        return None
    if loss.offset_noise:
        return (
            f"loss.offset_noise={loss.offset_noise:g} with zero terminal SNR: it must be 0; it "
            "stands in for the missing black and white by shifting each channel's mean, but the "
            "last timestep is pure noise now, and sampling starts from noise that has no such "
            "shift: training would see another distribution there; zero terminal SNR already "
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
