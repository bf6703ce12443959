"""Two settings on the same prompts: differences, wins, and a correction for many metrics.

Everything is paired: entry i of `values` and of `baseline` is prompt i's score (or the mean over
its seeds). Differences of means take a bootstrap over prompts (`statistics.bca_interval`); wins and
losses the exact binomial test of 1/2 on what is no tie. Several metrics tested at once take Holm's
step-down correction (Holm 1979):

    p~_(i) = max over j <= i of min(1, (m - j + 1) p_(j))        p_(1) <= ... <= p_(m)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from blackpoint.sampling.choices import SCORE_DECIMALS
from blackpoint.sampling.statistics.estimates import Estimate, Values, checked_values, mean


@dataclass(frozen=True)
class Outcomes:
    """On how many prompts the values are above, at and below the baseline."""

    wins: int
    ties: int
    losses: int
    p_value: float
    """Exact two-sided binomial test that wins and losses are equally likely."""


def mean_difference(values: Values, baseline: Values, seed: int = 0) -> Estimate:
    """Estimates mean(values) - mean(baseline), with a paired bootstrap interval over prompts."""
    first, second = _checked_pairs(values, baseline)
    return mean(first - second, seed=seed)


def count_outcomes(values: Values, baseline: Values) -> Outcomes:
    """Counts wins (higher), ties (equal after rounding to 1e-4) and losses, and tests them.

    With ties alone the p-value is 1.
    """
    first, second = (np.round(v, SCORE_DECIMALS) for v in _checked_pairs(values, baseline))
    wins, losses = int((first > second).sum()), int((first < second).sum())
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Outcomes(wins, len(first) - wins - losses, losses, p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns each metric's p-value adjusted for testing all of them (Holm 1979), in the order
    given."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, metric in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[metric]))
        adjusted[metric] = largest
    return {metric: adjusted[metric] for metric in p_values}


def _checked_pairs(values: Values, baseline: Values) -> tuple[np.ndarray, np.ndarray]:
    assert len(values) == len(baseline)
    return checked_values(values, 1), checked_values(baseline, 1)
