"""Diversity of a set of images: the mean distance of their features over all pairs.

    D = sum_{i != j} |f_i - f_j| / (n (n - 1))

with f rows of numbers from any module. The change between two sets of the same prompts
is estimated by a bootstrap over prompts: a sample that holds prompt i w_i times weights the pair
(i, j) with w_i w_j, in both sets alike, and leaves out pairs of a prompt with itself.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.statistics.estimates import (
    NUM_RESAMPLES,
    Estimate,
    bca_interval,
    influences,
)

Features = Float[Tensor, "n d"]
BLOCK_PAIRS = 2**22


def mean_pairwise_distance(features: Features) -> float:
    """Returns the mean Euclidean distance over all pairs of two rows or more."""
    return float(_weighted_distance(features, np.ones((1, len(features))))[0])


def diversity_change(features: Features, baseline: Features, seed: int = 0) -> Estimate:
    """Estimates the mean pairwise distance of `features` minus that of `baseline`.

    Row i of both belongs to prompt i, of two or more; the interval is a paired bootstrap over
    prompts.
    """
    n = len(features)
    assert n == len(baseline) > 1
    value = mean_pairwise_distance(features) - mean_pairwise_distance(baseline)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES).astype(np.float64)
    counts = counts[(counts > 0).sum(axis=1) > 1]  # one prompt alone has no pairs
    without = 1 - np.eye(n) if n > 2 else np.empty((0, n))  # one prompt alone has none either
    changes = _weighted_distance(features, np.concatenate([counts, without]))
    changes -= _weighted_distance(baseline, np.concatenate([counts, without]))
    resampled, left_out = np.split(changes, [len(counts)])
    influence = influences(left_out) if n > 2 else np.zeros(n)
    return Estimate(value, *bca_interval(value, resampled, [influence]), n)


def _weighted_distance(features: Features, counts: np.ndarray) -> np.ndarray:
    """Returns the mean distance over pairs of different rows, a number for each row of counts."""
    weights = torch.from_numpy(counts)  # (resamples, n)
    rows = features.double().cpu()
    sums = torch.zeros(len(weights), dtype=torch.float64)
    width = max(1, BLOCK_PAIRS // len(rows))
    for start in range(0, len(rows), width):
        block = slice(start, start + width)
        # Not by products of rows: these give equal images a distance.
        distances = torch.cdist(rows, rows[block], compute_mode="donot_use_mm_for_euclid_dist")
        sums += ((weights @ distances) * weights[:, block]).sum(dim=1)
    num_pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
    return (sums / num_pairs).numpy()
