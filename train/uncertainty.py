"""Learned uncertainty: each timestep's loss divided by how large it is expected to be.

    minimise  w(t) L / exp(u(t)) + u(t)   over the UNet and u;   then  u(t) = log E[w L | t]

so every timestep ends up with a loss near 1, and gradients of equal size (Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", equations 14 to 16 and 21).
There u sees log sigma; at zero terminal SNR that is infinite, so here it sees t / T:

    u(t) = sum_k c_k f_k(t / T),   f_0 = 1,   f_k(s) = sqrt(2) cos(pi k s)

The effective weight w / exp(u) is positive at every t, the last included. u starts at 0, where the
loss is the plain one. It is saved with the run and is no part of an exported model.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blackpoint.sampling.runtime.transfer import sent

NUM_FEATURES = 16


class LearnedUncertainty(nn.Module):
    """u(t): one linear layer on Fourier features of t / T, float32 in every precision mode."""

    def __init__(self, num_timesteps: int, num_features: int = NUM_FEATURES) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(num_features))
        s = torch.arange(num_timesteps, dtype=torch.float64) / num_timesteps
        features = (math.pi * torch.arange(num_features) * s[:, None]).cos()
        features[:, 1:] *= math.sqrt(2)
        self._features = features.float()  # no buffer: nothing to save, average or broadcast

    def features(self, t: Int[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Returns the Fourier features of t / T, computed in float64 and cast to float32; on the
        device of the coefficients."""
        device = self.coefficients.device
        self._features = sent(self._features, device)
        return self._features[sent(t, device)]

    def forward(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns u(t), on the device of the coefficients."""
        # A product and a sum, where autocast would turn a matrix product into half precision.
        return (self.features(t) * self.coefficients).sum(dim=1)
