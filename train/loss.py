"""The training loss, in pure functions.

    L = E_t w(t) || target - output ||^2 / (C H W),   w(t) = 1  (lambda_t = 1, Lin et al. 2023)

The target is v, eps or x0 (`sampling.prediction.training_target`), and v by default: with v the
last timestep of a zero-terminal-SNR schedule carries full weight, its target being -x0.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_error(
    output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, " b"]:
    """Returns each sample's mean squared error over channel, height and width, in float32."""
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)


def uniform_weights(num_timesteps: int) -> Float[Tensor, " T"]:
    """Returns w(t) = 1 for every timestep, the last one included."""
    return torch.ones(num_timesteps)
