"""Scores of several images of each prompt: do they rank alike, and what is the best of k worth?

All statistics are over prompts: the K images of a prompt give one rank correlation, and one
expected value of the best. The expected quality of the best by a score among k images, over all
subsets of the K that were made, needs no further sampling: with the images sorted by the score,
worst first, the one of rank r (from 1) is the best of C(r-1, k-1) of the C(K, k) subsets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from blackpoint.data.files.plain import number
from blackpoint.sampling.statistics.estimates import Estimate, mean, smallest_detectable_effect

FEWEST = 3
"""Images with finite scores that a rank correlation needs."""
Scores = dict[str, np.ndarray]
"""Score -> (P, K): one row per prompt, a column per image; NaN where there is no number."""


@dataclass(frozen=True)
class Candidates:
    """Several independent images of each prompt, by every score."""

    scores: Scores
    qualities: tuple[str, ...]
    """Scores that judge a picture by itself; the others are of the run that made it."""


@dataclass(frozen=True)
class RankCorrelation:
    """Mean over prompts of the rank correlation, within a prompt, of two scores."""

    spearman: Estimate
    kendall: Estimate
    detectable: float
    """Smallest mean Spearman that so many prompts would have shown with power 0.8."""


def scores_by_prompt(
    rows: Iterable[tuple[int, int, Mapping[str, Any]]], names: Sequence[str]
) -> Scores | None:
    """Returns the named scores of rows (prompt, number of the image, scores by name).

    None where prompts have fewer than `FEWEST` images; of unequal numbers, the smallest counts.
    """
    by_prompt: dict[int, dict[int, Mapping[str, Any]]] = {}
    for prompt, image, scores in rows:
        by_prompt.setdefault(prompt, {})[image] = scores
    count = min(map(len, by_prompt.values()), default=0)
    if count < FEWEST or not names:
        return None
    table = [
        [images[which] for which in sorted(images)[:count]]
        for _, images in sorted(by_prompt.items())
    ]
    return {
        name: np.array([[number(scores.get(name)) for scores in line] for line in table])
        for name in names
    }


def rank_correlation(scores: Scores, first: str, second: str) -> RankCorrelation | None:
    """Returns the mean rank correlation; None where fewer than two prompts have one."""
    rhos, taus = [], []
    for x, y in zip(scores[first], scores[second], strict=True):
        x, y = _both_finite(x, y)
        if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        rhos.append(float(stats.spearmanr(x, y).statistic))
        taus.append(float(stats.kendalltau(x, y).statistic))
    if len(rhos) < 2:
        return None
    return RankCorrelation(mean(rhos), mean(taus), smallest_detectable_effect(np.array(rhos)))


def gain_of_best(scores: Scores, chosen_by: str, quality: str, count: int) -> np.ndarray:
    """Returns, per prompt, the expected quality of the best of `count` minus the mean quality."""
    plain = np.array([np.mean(row[np.isfinite(row)]) for row in scores[quality]])
    return expected_of_best(scores[chosen_by], scores[quality], count) - plain


def expected_of_best(score: np.ndarray, quality: np.ndarray, count: int) -> np.ndarray:
    """Returns E[quality of the best by `score`] of `count` images of each prompt, (P,).

    Of all its images where fewer have numbers; NaN where none has.
    """
    expected = []
    for x, y in zip(score, quality, strict=True):
        x, y = _both_finite(x, y)
        ranks, taken = np.arange(len(x)), min(count, len(x))
        weights = np.exp(_log_choose(ranks, taken - 1) - _log_choose(len(x), taken))
        order = np.lexsort((-ranks, x))  # of equal scores the earlier image wins
        expected.append(float((weights * y[order]).sum()) if taken else float("nan"))
    return np.array(expected)


def counts_up_to(most: int) -> list[int]:
    """Returns 1, 2, 5, 10, ... below `most`, and `most`."""
    steps = [size for power in range(6) for size in (10**power, 2 * 10**power, 5 * 10**power)]
    return [*(size for size in steps if size < most), most]


def finite_mean(values: np.ndarray) -> Estimate:
    """Estimates the mean over the prompts that have a number."""
    return mean(values[np.isfinite(values)])


def _both_finite(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(first) & np.isfinite(second)
    return first[finite], second[finite]


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    """Returns log C(n, k); -inf where k > n."""
    n = np.asarray(n, dtype=np.float64)
    short = n < k
    value = special.gammaln(n + 1) - special.gammaln(k + 1)
    return np.where(short, -np.inf, value - special.gammaln(np.where(short, 1, n - k + 1)))
