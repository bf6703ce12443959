"""Rank correlations of two scores of the same candidates, with bootstrap intervals over them.

Spearman's rho is the correlation of the ranks (mean ranks for ties); Kendall's tau-b counts pairs:

    tau_b = sum_ij s_ij / sqrt(sum_ij |x_ij| sum_ij |y_ij|),    s_ij = x_ij y_ij,
    x_ij = sign(x_i - x_j), y_ij = sign(y_i - y_j)

A bootstrap sample that holds candidate i w_i times only weights the pair (i, j) with w_i w_j, so
all samples share one table of signs. Samples in which a score is constant have no correlation and
are left out of the interval.
"""

import numpy as np
from scipy import stats

from sampling.errors import UserError
from sampling.evaluation.statistics import (
    LEVEL,
    NUM_RESAMPLES,
    Estimate,
    Values,
    checked_values,
    percentiles,
)

BLOCK_PAIRS = 2**22
SMALLEST = 3


def spearman(first: Values, second: Values, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Estimates Spearman's rho, with a percentile bootstrap interval over the pairs."""
    x, y = _checked_pairs(first, second)
    value = float(stats.spearmanr(x, y).statistic)
    drawn = np.random.default_rng(seed).integers(len(x), size=(NUM_RESAMPLES, len(x)))
    x_ranks, y_ranks = (stats.rankdata(scores[drawn], axis=1) for scores in (x, y))
    x_ranks -= x_ranks.mean(axis=1, keepdims=True)
    y_ranks -= y_ranks.mean(axis=1, keepdims=True)
    products = (x_ranks * y_ranks).sum(axis=1)
    return _estimate(
        value, products, (x_ranks**2).sum(axis=1), (y_ranks**2).sum(axis=1), len(x), level
    )


def kendall(first: Values, second: Values, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Estimates Kendall's tau-b, with a percentile bootstrap interval; time grows as n squared."""
    x, y = _checked_pairs(first, second)
    n = len(x)
    value = float(stats.kendalltau(x, y).statistic)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES).astype(np.float64)
    both, x_pairs, y_pairs = np.zeros((3, NUM_RESAMPLES))
    width = max(1, BLOCK_PAIRS // n)
    for start in range(0, n, width):
        block = slice(start, start + width)
        x_signs = np.sign(x[:, None] - x[block])
        y_signs = np.sign(y[:, None] - y[block])
        both += ((counts @ (x_signs * y_signs)) * counts[:, block]).sum(axis=1)
        x_pairs += ((counts @ np.abs(x_signs)) * counts[:, block]).sum(axis=1)
        y_pairs += ((counts @ np.abs(y_signs)) * counts[:, block]).sum(axis=1)
    return _estimate(value, both, x_pairs, y_pairs, n, level)


def _estimate(
    value: float, both: np.ndarray, first: np.ndarray, second: np.ndarray, n: int, level: float
) -> Estimate:
    """Divides the joint sums of the bootstrap samples by those of each score."""
    defined = (first > 0) & (second > 0)
    resampled = both[defined] / np.sqrt(first[defined] * second[defined])
    low, high = percentiles(resampled.clip(-1, 1), level)
    return Estimate(value, low, high, n)


def _checked_pairs(first: Values, second: Values) -> tuple[np.ndarray, np.ndarray]:
    x, y = checked_values(first, SMALLEST), checked_values(second, SMALLEST)
    if len(x) != len(y):
        raise UserError(
            f"a rank correlation of {len(x)} and {len(y)} scores: they are no pairs; give both of "
            "the same candidates, in the same order"
        )
    if (x == x[0]).all() or (y == y[0]).all():
        raise UserError(
            "a rank correlation of a score that is the same for all: it has no ranks; give scores "
            "that vary"
        )
    return x, y
