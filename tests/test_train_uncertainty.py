"""Laws of the learned uncertainty u(t)."""

import pytest
import torch
from torch.testing import assert_close

from blackpoint.train.uncertainty import LearnedUncertainty


def test_it_starts_at_zero_where_the_loss_is_the_plain_one() -> None:
    uncertainty = LearnedUncertainty(1000)(torch.arange(1000))
    assert torch.equal(uncertainty, torch.zeros(1000))


def test_features_are_orthonormal_over_the_timesteps() -> None:
    t = torch.arange(1000)
    features = LearnedUncertainty(1000).features(t)
    assert features.dtype == torch.float32 and torch.isfinite(features).all()
    gram = features.double().T @ features.double() / 1000
    assert_close(gram, torch.eye(16, dtype=torch.float64), rtol=0, atol=5e-3)


def test_it_stays_in_float32_under_autocast() -> None:
    uncertainty = LearnedUncertainty(1000)
    torch.nn.init.normal_(uncertainty.coefficients, generator=torch.Generator().manual_seed(0))
    plain = uncertainty(torch.arange(1000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = uncertainty(torch.arange(1000))
    assert_close(under_autocast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_it_learns_the_logarithm_of_the_expected_weighted_loss(weight: float) -> None:
    """With u = log E[w L | t] every timestep has the same share of the loss, the last included."""
    t = torch.arange(1000)
    losses = torch.exp(-1 + 0.8 * torch.cos(3 * t / 1000)) * weight
    uncertainty = LearnedUncertainty(1000)
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.1)
    for _ in range(120):
        u = uncertainty(t)
        optimizer.zero_grad()
        (losses / u.exp() + u).mean().backward()
        optimizer.step()
    assert_close(uncertainty(t), losses.log(), rtol=0, atol=0.05)
    assert (losses / uncertainty(t).exp())[-1].item() == pytest.approx(1, abs=0.05)
