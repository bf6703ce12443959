"""FID of a set of images, and FID extrapolated to infinite n, each with its interval.

    FID = |m - m_r|^2 + tr C + tr C_r - 2 tr (C_r^1/2 C C_r^1/2)^1/2   (Heusel et al. 2017)

The last trace is the sum of the singular values of X C_r^1/2 / sqrt(n - 1), with X the centred
features: exact for sets of fewer images than features, whose covariance is singular, and for one
image, whose covariance is 0.

FID of n images estimates the one of the distribution that they are drawn from with a bias that
falls as 1/n:  E[FID_n] = FID_inf + a / n + b / n^2 + ...  (Chong and Forsyth 2020, who fit a line
over many n). Here the set is split into 1, 2 and 4 disjoint parts, so that every mean FID rests on
all images and the three share most of their noise, and the curve through them is taken at 1/n = 0:

    FID_inf = sum_k c_k F_k,  F_k mean FID of k parts,  c_k = prod_{j != k} x_j / (x_j - x_k),

x_k the mean of 1 / images in a part. Intervals are Student's t on an infinitesimal jackknife over
groups of images (Efron 1982): FID is a smooth function of the images' weights. With the singular
value decomposition U S V^T of the above, its derivative by the weight of image i, u_i = f_i - m, is

    [2 (m - m_r) . u_i + n |u_i|^2 / (n - 1) - n sum_k S_k U_ik^2 - tr C + sum_k S_k] / n

The line through F_1 and F_2 alone errs to the other side of what the curve errs, once a half holds
more images than there are features; the interval is widened by the distance of the two.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.statistics.estimates import Estimate, influence_interval

COUNTS = (1, 2, 4)
"""Into how many parts the set is split."""
FEWEST_IN_PART = 5
"""Groups of images (prompts) in the smallest part."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of the features of the reference images, float64."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @functools.cached_property
    def root(self) -> Float[Tensor, "d d"]:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def gaussian_of(features: Float[Tensor, "n d"]) -> Gaussian:
    """Returns mean and covariance (divisor n - 1) of at least two rows of features."""
    rows = features.double()
    return Gaussian(rows.mean(dim=0), torch.atleast_2d(rows.T.cov()))


def frechet_distance(features: Float[Tensor, "n d"], reference: Gaussian) -> float:
    """Returns FID of features to the reference; n may be 1."""
    apart, scaled = _centred(features.double(), reference)
    overlap = torch.linalg.svdvals(scaled @ reference.root).sum()
    return _distance(apart, scaled, overlap, reference)


def frechet_influence(rows: Tensor, reference: Gaussian) -> tuple[float, Tensor]:
    """Returns FID of rows (n, d), and its derivative by the weight of each row, (n,); float64."""
    count = len(rows)
    apart, scaled = _centred(rows, reference)
    left, values, _ = torch.linalg.svd(scaled @ reference.root, full_matrices=False)
    norms, overlap = scaled.square().sum(dim=1), values.sum()
    slope = 2 * (count - 1) ** 0.5 * scaled @ apart + count * (norms - left.square() @ values)
    slope += overlap - norms.sum()
    return _distance(apart, scaled, overlap, reference), slope / count


def frechet_estimates(
    rows: Tensor, reference: Gaussian, groups: np.ndarray, seed: int = 0
) -> tuple[Estimate, Estimate | None]:
    """Returns FID of rows (n, d), with its interval at this n, and FID at infinite n.

    groups: (n,), which images are not independent of each other. The second is None where
    `lack_of_images` says why.
    """
    kinds, owner = np.unique(groups, return_inverse=True)

    def interval(value: float, slope: Tensor) -> Estimate:
        by_group = np.bincount(owner, slope.numpy(), len(kinds))
        return influence_interval(value, by_group, len(rows))

    value, slope = frechet_influence(rows, reference)
    of_set = interval(value, slope)
    if lack_of_images(len(rows), rows.shape[1], len(kinds)):
        return of_set, None
    shuffled = np.random.default_rng(seed).permutation(len(kinds))
    inverses, means, slopes = [1 / len(rows)], [value], [slope]
    for count in COUNTS[1:]:
        part_of = shuffled[owner] % count
        parts = [torch.from_numpy(np.flatnonzero(part_of == part)) for part in range(count)]
        slope, total = torch.zeros(len(rows), dtype=torch.float64), 0.0
        for part in parts:
            distance, derivatives = frechet_influence(rows[part], reference)
            slope[part], total = derivatives / count, total + distance
        inverses.append(float(np.mean([1 / len(part) for part in parts])))
        means.append(total / count)
        slopes.append(slope)
    weights = _at_zero(inverses)
    curve, line = float(weights @ means), float(_at_zero(inverses[:2]) @ means[:2])
    sampling = interval(curve, torch.stack(slopes).T @ torch.from_numpy(weights))
    doubt = abs(curve - line)
    return of_set, Estimate(curve, sampling.low - doubt, sampling.high + doubt, len(rows))


def lack_of_images(num_images: int, num_features: int, num_groups: int) -> str:
    """Says why FID cannot be extrapolated; nothing where it can be."""
    fewest = FEWEST_IN_PART * COUNTS[-1]
    if num_groups < fewest:
        return (
            f"{num_groups} prompts (images, where there are fewer than 3 prompts); to split them "
            f"takes at least {fewest}"
        )
    if num_images // 2 <= num_features:
        return (
            f"{num_images} images of {num_features} features: a half must have more images than "
            "features, else FID is no smooth function of 1/n"
        )
    return ""


def _centred(rows: Tensor, reference: Gaussian) -> tuple[Tensor, Tensor]:
    """Returns the distance of the means (d,), and the centred rows over sqrt(n - 1), (n, d)."""
    mean = rows.mean(dim=0)
    return mean - reference.mean, (rows - mean) / max(len(rows) - 1, 1) ** 0.5


def _distance(apart: Tensor, scaled: Tensor, overlap: Tensor, reference: Gaussian) -> float:
    traces = scaled.square().sum() + reference.covariance.trace()
    return float(apart.square().sum() + traces - 2 * overlap)


def _at_zero(points: Sequence[float]) -> np.ndarray:
    """Returns the weights of the values at `points` in their polynomial's value at 0 (Lagrange)."""
    return np.array(
        [
            math.prod(other / (other - point) for other in points if other != point)
            for point in points
        ]
    )
