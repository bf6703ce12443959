"""What the fine-tune minimises, in pure functions; train/loss_config.py has its options.

    L = E_t w(t) || target - output ||^2 / (C H W),   w(t) = 1 by default (Lin et al. 2023)

The target is v, eps or x0 (`sampling.prediction.training_target`), and v by default: with v the
last timestep of a zero-terminal-SNR schedule carries full weight, its target being -x0. Other
weights are in `train.weighting`, the learned one in `train.uncertainty`, the draws of t and eps in
`train.draws`.
"""

from jaxtyping import Float
from torch import Tensor


def squared_error(
    output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, " b"]:
    """Returns each sample's mean squared error over channel, height and width, in float32."""
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)
