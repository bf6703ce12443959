"""The fine-tune's loss in pure functions; train/loss_config.py has its options.

    L = E_t w(t) || target - output ||^2 / (C H W),   w(t) = 1 by default (Lin et al. 2023)

With several scales (Hoogeboom et al. 2023, section 3.2), D_p the means over p x p latents:

    L = sum_p w_p || D_p[target - output] ||^2 / (C H W / p^2),   w_p = p or 1

The target is v, eps or x0 (`blackpoint.sampling.prediction.training_target`), and v by default:
with v the last timestep of a zero-terminal-SNR schedule carries full weight, its target being -x0.
Other weights are in `blackpoint.train.weighting`, the learned one in
`blackpoint.train.uncertainty`, the draws of t and eps in `blackpoint.train.draws`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from blackpoint.data.files.errors import UserError
from blackpoint.train.loss_config import ScaleWeights


def squared_error(
    output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]
) -> Float[Tensor, " b"]:
    """Returns each sample's mean squared error over channel, height and width, in float32."""
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)


def scale_errors(
    output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], factors: Sequence[int]
) -> Float[Tensor, "s b"]:
    """Returns each sample's mean squared error of p x p means, one row for each p of `factors`.

    Raises UserError for a p that does not divide height and width.
    """
    check_scales(factors, *output.shape[-2:])
    error = output.float() - target.float()
    pooled = [F.avg_pool2d(error, p) if p > 1 else error for p in factors]
    return torch.stack([errors.square().flatten(1).mean(dim=1) for errors in pooled])


def check_scales(factors: Sequence[int], height: int, width: int) -> None:
    """Raises UserError unless every factor divides the latents' height and width."""
    for p in factors:
        if height % p or width % p:
            raise UserError(
                f"loss.pool_factors: {p} does not divide latents of {width} x {height}; choose "
                "divisors of both sides"
            )


def scale_weights(factors: Sequence[int], kind: ScaleWeights) -> Float[Tensor, " s"]:
    """Returns w_p: p, the paper's 1 / resolution with 1 at full size, or 1 for all."""
    return torch.tensor([float(p) if kind == "inverse_resolution" else 1.0 for p in factors])
