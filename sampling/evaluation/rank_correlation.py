"""Rank correlations of two scores of the same candidates, with bootstrap intervals over them.

Spearman's rho is the correlation of the ranks (mean ranks for ties); Kendall's tau-b counts pairs:

    tau_b = sum_ij s_ij / sqrt(sum_ij |x_ij| sum_ij |y_ij|),    s_ij = x_ij y_ij,
    x_ij = sign(x_i - x_j), y_ij = sign(y_i - y_j)

A bootstrap sample that holds candidate i w_i times only weights the pair (i, j) with w_i w_j, so
all samples share one table of signs. Samples in which a score is constant have no correlation and
are left out of the interval.
"""

import math

import numpy as np
from scipy import stats

from data.files.errors import UserError
from sampling.evaluation.statistics import (
    LEVEL,
    NUM_RESAMPLES,
    Estimate,
    Values,
    bca_interval,
    checked_values,
    influences,
)

BLOCK_PAIRS = 2**22
SMALLEST = 3
MOST_LEFT_OUT = 2000
"""Candidates up to which each is left out in turn; the skewness of more is taken as 0."""


def spearman(first: Values, second: Values, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Estimates Spearman's rho, with a bootstrap interval over the pairs."""
    x, y = _checked_pairs(first, second)
    n = len(x)
    value = float(stats.spearmanr(x, y).statistic)
    drawn = np.random.default_rng(seed).integers(n, size=(NUM_RESAMPLES, n))
    left_out = _rhos(x, y, _all_but_one(n)) if n <= MOST_LEFT_OUT else None
    return _estimate(value, _rhos(x, y, drawn), left_out, n, level)


def kendall(first: Values, second: Values, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Estimates Kendall's tau-b, with a bootstrap interval; time grows as n squared."""
    x, y = _checked_pairs(first, second)
    n = len(x)
    value = float(stats.kendalltau(x, y).statistic)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES).astype(np.float64)
    left_out = _taus(x, y, 1 - np.eye(n)) if n <= MOST_LEFT_OUT else None
    return _estimate(value, _taus(x, y, counts), left_out, n, level)


def _rhos(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Returns Spearman's rho of each row of candidates drawn; NaN where a score is constant."""
    x_ranks, y_ranks = (stats.rankdata(scores[drawn], axis=1) for scores in (x, y))
    x_ranks -= x_ranks.mean(axis=1, keepdims=True)
    y_ranks -= y_ranks.mean(axis=1, keepdims=True)
    products = (x_ranks * y_ranks).sum(axis=1)
    return _correlations(products, (x_ranks**2).sum(axis=1), (y_ranks**2).sum(axis=1))


def _taus(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns tau-b for each row of counts of the candidates; NaN where a score is constant."""
    n = len(x)
    both, x_pairs, y_pairs = np.zeros((3, len(counts)))
    width = max(1, BLOCK_PAIRS // n)
    for start in range(0, n, width):
        block = slice(start, start + width)
        x_signs = np.sign(x[:, None] - x[block])
        y_signs = np.sign(y[:, None] - y[block])
        both += ((counts @ (x_signs * y_signs)) * counts[:, block]).sum(axis=1)
        x_pairs += ((counts @ np.abs(x_signs)) * counts[:, block]).sum(axis=1)
        y_pairs += ((counts @ np.abs(y_signs)) * counts[:, block]).sum(axis=1)
    return _correlations(both, x_pairs, y_pairs)


def _correlations(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Divides the joint sums of samples by those of each score."""
    defined = (first > 0) & (second > 0)
    spread = np.sqrt(np.where(defined, first * second, math.nan))
    return (both / spread).clip(-1, 1)


def _all_but_one(n: int) -> np.ndarray:
    """Returns the places of all candidates but each in turn, (n, n - 1)."""
    places = np.arange(n - 1)
    return places + (places >= np.arange(n)[:, None])


def _estimate(
    value: float, resampled: np.ndarray, left_out: np.ndarray | None, n: int, level: float
) -> Estimate:
    influence = np.zeros(n) if left_out is None else influences(left_out)
    return Estimate(value, *bca_interval(value, resampled, [influence], level), n)


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
