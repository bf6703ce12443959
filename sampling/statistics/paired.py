"""Two settings on the same prompts: differences, wins, and a correction for many metrics.

Everything is paired: entry i of `values` and of `baseline` is prompt i's score (or the mean over
its seeds). Differences of means take a bootstrap over prompts (`statistics.bca_interval`); wins and
losses the exact binomial test of 1/2 on what is no tie, their share Clopper and Pearson's interval
(1934). Several metrics tested at once take Holm's step-down correction (Holm 1979):

    p~_(i) = max over j <= i of min(1, (m - j + 1) p_(j))        p_(1) <= ... <= p_(m)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from blackpoint.sampling.choices import SCORE_DECIMALS
from blackpoint.sampling.statistics.estimates import LEVEL, Estimate, Values, checked_values, mean


@dataclass(frozen=True)
class Outcomes:
    """On how many prompts the values are above, at and below the baseline."""

    wins: int
    ties: int
    losses: int
    win_share: Estimate
    """wins / (wins + losses), with its exact interval; n counts both."""
    p_value: float
    """Exact two-sided binomial test that wins and losses are equally likely."""

    def __str__(self) -> str:
        return f"{self.wins} wins, {self.ties} ties, {self.losses} losses (p = {self.p_value:.2g})"


def mean_difference(
    values: Values, baseline: Values, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """Estimates mean(values) - mean(baseline), with a paired bootstrap interval over prompts."""
    first, second = _checked_pairs(values, baseline)
    return mean(first - second, level, seed)


def count_outcomes(values: Values, baseline: Values, level: float = LEVEL) -> Outcomes:
    """Counts wins (higher), ties (equal after rounding to 1e-4) and losses, and tests them.

    With ties alone the p-value is 1, the share of wins nan, and its interval [0, 1].
    """
    first, second = (np.round(v, SCORE_DECIMALS) for v in _checked_pairs(values, baseline))
    wins, losses = int((first > second).sum()), int((first < second).sum())
    decided = wins + losses
    ties = len(first) - decided
    if decided == 0:
        return Outcomes(0, ties, 0, Estimate(float("nan"), 0.0, 1.0, 0), 1.0)
    test = stats.binomtest(wins, decided)
    low, high = test.proportion_ci(level, method="exact")
    share = Estimate(wins / decided, float(low), float(high), decided)
    return Outcomes(wins, ties, losses, share, float(test.pvalue))


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
