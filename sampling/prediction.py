"""The network's target, and how to read x0 and eps from its prediction.

    x_t = alpha x0 + sigma eps,   v = alpha eps - sigma x0   (Salimans and Ho 2022)
    x0 = alpha x_t - sigma v,     eps = sigma x_t + alpha v

The v conversions are exact for every alpha in [0, 1]. x0 from eps divides by alpha and is undefined
at zero terminal SNR. The training target and its inverse stand side by side here so that a target
which the samplers do not invert cannot be written.

Shapes: x0, eps, x_t, v are (B, ...); alpha and sigma broadcast against them, such as (B, 1, 1, 1).
"""

from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.choices import PredictionType

Latent = Float[Tensor, "b *chw"]
Coefficient = Float[Tensor, "..."] | float


def add_noise(x0: Latent, eps: Latent, alpha: Coefficient, sigma: Coefficient) -> Latent:
    """Returns x_t = alpha x0 + sigma eps."""
    return alpha * x0 + sigma * eps


def training_target(
    prediction_type: PredictionType,
    x0: Latent,
    eps: Latent,
    alpha: Coefficient,
    sigma: Coefficient,
) -> Latent:
    """Returns the training target of the network: v, eps or x0."""
    match prediction_type:
        case "v_prediction":
            return alpha * eps - sigma * x0
        case "epsilon":
            return eps
        case "sample":
            return x0
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def to_x0(
    prediction_type: PredictionType,
    output: Latent,
    x_t: Latent,
    alpha: Coefficient,
    sigma: Coefficient,
) -> Latent:
    """Reads x0 from the network's output; the inverse of `training_target`."""
    match prediction_type:
        case "v_prediction":
            return v_to_x0(output, x_t, alpha, sigma)
        case "epsilon":
            return eps_to_x0(output, x_t, alpha, sigma)
        case "sample":
            return output
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def to_eps(
    prediction_type: PredictionType,
    output: Latent,
    x_t: Latent,
    alpha: Coefficient,
    sigma: Coefficient,
) -> Latent:
    """Reads eps from the network's output; the inverse of `training_target`."""
    match prediction_type:
        case "v_prediction":
            return v_to_eps(output, x_t, alpha, sigma)
        case "epsilon":
            return output
        case "sample":
            return x0_to_eps(output, x_t, alpha, sigma)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def v_to_x0(v: Latent, x_t: Latent, alpha: Coefficient, sigma: Coefficient) -> Latent:
    """Returns alpha x_t - sigma v; at alpha = 0 this is -v whatever x_t is."""
    return alpha * x_t - sigma * v


def v_to_eps(v: Latent, x_t: Latent, alpha: Coefficient, sigma: Coefficient) -> Latent:
    """Returns sigma x_t + alpha v; at alpha = 0 this is x_t."""
    return sigma * x_t + alpha * v


def eps_to_x0(eps: Latent, x_t: Latent, alpha: Coefficient, sigma: Coefficient) -> Latent:
    """Returns (x_t - sigma eps) / alpha; not finite at alpha = 0."""
    return (x_t - sigma * eps) / alpha


def x0_to_eps(x0: Latent, x_t: Latent, alpha: Coefficient, sigma: Coefficient) -> Latent:
    """Returns (x_t - alpha x0) / sigma; sigma is never 0 at a training timestep."""
    return (x_t - alpha * x0) / sigma
