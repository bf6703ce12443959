"""FID of a set of n images, and FID extrapolated to infinite n, each with its interval.

FID of n images estimates the one of the distribution that they are drawn from with a bias that
falls as 1/n:  E[FID_n] = FID_inf + a / n + b / n^2 + ...  (Chong and Forsyth 2020, who fit a line
over many n). Here the set is split into 1, 2 and 4 disjoint parts, so that every mean FID rests on
all images and the three share most of their noise, and the curve through them is taken at 1/n = 0:

    FID_inf = sum_k c_k F_k,  F_k mean FID of k parts,  c_k = prod_{j != k} x_j / (x_j - x_k),

x_k the mean of 1 / images in a part. Intervals are Student's t on an infinitesimal jackknife over
groups of images (Efron 1982): FID is a smooth function of the images' weights, its derivative by
the weight of image i, with u_i = f_i - m, M = C_r^1/2 C C_r^1/2,

    [2 (m - m_r) . u_i + n / (n - 1) (|u_i|^2 - |M^-1/4 C_r^1/2 u_i|^2) - tr C + tr M^1/2] / n

costs one eigendecomposition of the smaller side, n or d. The line through F_1 and F_2 alone errs to
the other side of what the curve errs, once a half holds more images than there are features; the
interval is widened by the distance of the two.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sampling.evaluation.statistics import LEVEL, Estimate, influence_interval
from sampling.verifiers.reference import Gaussian

COUNTS = (1, 2, 4)
"""Into how many parts the set is split."""
FEWEST_IN_PART = 5
"""Groups of images (prompts) in the smallest part."""


def frechet_influence(rows: Tensor, reference: Gaussian, root: Tensor) -> tuple[float, Tensor]:
    """Returns FID of rows (m, d), and its derivative by the weight of each row, (m,); float64.

    root: of the reference's covariance.
    """
    count, size = rows.shape
    mean = rows.mean(dim=0)
    apart, centered = mean - reference.mean, rows - mean
    if count > size:
        middle = root @ (centered.T @ centered / (count - 1)) @ root
        values, vectors = torch.linalg.eigh(middle)
        roots = values.clamp(min=0).sqrt()
        is_known = values > size * torch.finfo(values.dtype).eps * values[-1]
        scale = torch.where(is_known, 1 / roots, 0)
        inner = (centered @ (root @ vectors)).square() @ scale
    else:
        projected = centered @ root
        values, vectors = torch.linalg.eigh(projected @ projected.T / (count - 1))
        roots = values.clamp(min=0).sqrt()
        inner = (count - 1) * (vectors.square() @ roots)
    norms = centered.square().sum(dim=1)
    trace, overlap = float(norms.sum()) / (count - 1), float(roots.sum())
    value = float(apart.square().sum() + reference.covariance.trace()) + trace - 2 * overlap
    slope = 2 * centered @ apart + count / (count - 1) * (norms - inner) - trace + overlap
    return value, slope / count


def frechet_estimates(
    rows: Tensor, reference: Gaussian, groups: np.ndarray, seed: int = 0, level: float = LEVEL
) -> tuple[Estimate, Estimate | None]:
    """Returns FID of rows (n, d), with its interval at this n, and FID at infinite n.

    groups: (n,), which images are not independent of each other. The second is None where
    `lack_of_images` says why.
    """
    root = reference.root
    kinds, owner = np.unique(groups, return_inverse=True)
    value, slope = frechet_influence(rows, reference, root)
    of_set = influence_interval(value, _sums(slope, owner, len(kinds)), len(rows), level)
    if lack_of_images(len(rows), rows.shape[1], len(kinds)):
        return of_set, None
    shuffled = np.random.default_rng(seed).permutation(len(kinds))
    inverses, means, slopes = [1 / len(rows)], [value], [slope]
    for count in COUNTS[1:]:
        part_of = shuffled[owner] % count
        parts = [torch.from_numpy(np.flatnonzero(part_of == part)) for part in range(count)]
        found = [frechet_influence(rows[part], reference, root) for part in parts]
        slope = torch.zeros(len(rows), dtype=torch.float64)
        for part, (_, own) in zip(parts, found, strict=True):
            slope[part] = own / count
        inverses.append(float(np.mean([1 / len(part) for part in parts])))
        means.append(float(np.mean([each for each, _ in found])))
        slopes.append(slope)
    weights = _at_zero(inverses)
    curve = float(weights @ means)
    line = float(_at_zero(inverses[:2]) @ means[:2])
    total = torch.stack(slopes).T @ torch.from_numpy(weights)
    sampling = influence_interval(curve, _sums(total, owner, len(kinds)), len(rows), level)
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


def _at_zero(places: Sequence[float]) -> np.ndarray:
    """Returns the weights of the values at `places` in their polynomial's value at 0 (Lagrange)."""
    return np.array(
        [math.prod(other / (other - own) for other in places if other != own) for own in places]
    )


def _sums(slope: Tensor, owner: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owner, slope.numpy(), count)
