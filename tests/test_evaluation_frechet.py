"""FID with its derivative, and FID at infinite n: bias and coverage where the truth is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from blackpoint.sampling.statistics.frechet import (
    Gaussian,
    frechet_distance,
    frechet_estimates,
    frechet_influence,
    gaussian_of,
    lack_of_images,
)
from blackpoint.scripts.measurements.measure_intervals import coverage, gaussian_sets


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator).double() + 0.5


def weighted_distance(own: torch.Tensor, weights: torch.Tensor, reference: Gaussian) -> float:
    """FID of the Gaussian of weighted rows, from singular values: exact for singular covariances
    too, where roots of eigenvalues err by 1e-8."""
    mean = weights @ own / weights.sum()
    centered = own - mean
    factor = len(own) / (len(own) - 1) / weights.sum()
    scaled = (factor * weights).sqrt()[:, None] * centered
    overlap = torch.linalg.svdvals(scaled @ reference.root).sum()
    traces = scaled.square().sum() + reference.covariance.trace()
    return float((mean - reference.mean).square().sum() + traces - 2 * overlap)


@pytest.mark.parametrize("count", [40, 6, 5])
def test_the_derivative_is_that_of_fid_by_a_weight(count: int) -> None:
    """More images than features, as many, and fewer. Central differences of step 1e-5 err by 1e-10
    of their third derivative and by 1e-15 / 1e-5 of rounding."""
    own, reference = rows(count, 6), gaussian_of(1.2 * rows(50, 6, 1))
    value, slope = frechet_influence(own, reference)
    assert value == pytest.approx(frechet_distance(own, reference), rel=1e-9)
    assert float(slope.sum()) == pytest.approx(0, abs=1e-9 * value)
    for place in (0, count - 1):
        step = 1e-5 * torch.eye(count, dtype=torch.float64)[place]
        ends = [
            weighted_distance(own, torch.ones(count).double() + sign * step, reference)
            for sign in (1, -1)
        ]
        assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("is_even", [True, False])
@pytest.mark.parametrize(
    ("num_features", "num_images"), [(4, 40), (8, 200), (32, 70), (32, 100), (32, 200)]
)
def test_fid_at_infinite_n_covers_the_true_one(
    num_features: int, num_images: int, is_even: bool
) -> None:
    """Of 60 intervals at .95 fewer than the bound hold the truth once in 10,000; the bias left is
    below a sixth of that at n, beside four standard errors of the mean of 60 sets."""
    count = 60
    at_n, found, truth = gaussian_sets(num_features, num_images, count, is_even)
    known = [each for each in found if each is not None]
    assert len(known) == count
    far, near = coverage(known, truth), coverage(at_n, truth)
    assert far.covered >= stats.binom.ppf(1e-4, count, 0.95) / count
    assert abs(far.bias) < near.bias / 6 + 4 * far.deviation / count**0.5
    assert coverage(at_n, truth + near.bias).covered >= stats.binom.ppf(1e-4, count, 0.95) / count


def test_the_interval_of_fid_at_n_misses_the_true_fid() -> None:
    at_n, _, truth = gaussian_sets(32, 200, 40, is_even=True)
    assert coverage(at_n, truth).covered == 0


def test_equal_distributions_come_out_at_0() -> None:
    """FID of 400 of the reference's own images is above 0; at infinite n 0 is in the interval."""
    size = 16
    reference = Gaussian(torch.zeros(size).double(), torch.eye(size).double())
    at_n, found = frechet_estimates(rows(400, size) - 0.5, reference, np.arange(400))
    assert found is not None and at_n.low > 0.1
    assert found.low <= 0 <= found.high


def test_what_cannot_be_extrapolated_is_left_out_and_said() -> None:
    reference = gaussian_of(rows(100, 30, 1))
    assert frechet_estimates(rows(61, 30), reference, np.arange(61))[1] is None
    assert "61 images of 30 features" in lack_of_images(61, 30, 61)
    assert "19 prompts" in lack_of_images(400, 30, 19)
    assert frechet_estimates(rows(62, 30), reference, np.arange(62))[1] is not None
    assert not lack_of_images(62, 30, 62)


def test_images_of_a_prompt_stay_together_and_the_split_is_seeded() -> None:
    """Four copies of each image say no more than one: the interval does not shrink."""
    own, reference = rows(60, 3), gaussian_of(rows(500, 3, 1))
    copies = own.repeat_interleave(4, dim=0)
    groups = np.repeat(np.arange(60), 4)
    one, _ = frechet_estimates(own, reference, np.arange(60))
    four, found = frechet_estimates(copies, reference, groups)
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.05)
    assert found == frechet_estimates(copies, reference, groups)[1]
    assert found != frechet_estimates(copies, reference, groups, seed=1)[1]
