"""Estimates with intervals: no number of an evaluation is shown without its n and its uncertainty.

Whatever is resampled takes one interval, `bca_interval`: quantiles of a seeded bootstrap at levels
corrected for bias and skewness (BCa: Efron 1987) and expanded for small n (Hesterberg 2015). With
influences u_i of the n observations on the statistic, resampled values r and p = share(r < value),
ties counting half:

    a = sum u^3 / (6 (sum u^2)^1.5),  z0 = Phi^-1(p),  z = +- sqrt(n / (n - 1)) t_{n-1},
    level = Phi(z0 + (z0 + z) / (1 - a (z0 + z)))

The plain percentile interval is too narrow by sqrt((n - 1) / n) z / t_{n-1}, which BCa alone keeps.
Proportions take Wilson's score interval (Wilson 1927), which stays honest near 0 and 1 where the
normal approximation does not. A few paired differences, one per seed, take Student's t.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import optimize, stats

from blackpoint.data.files.errors import UserError

LEVEL = 0.95
"""Of every interval."""
POWER = 0.8
NUM_RESAMPLES = 2000
FEWEST_GROUPS = 3
"""Groups that a jackknife leaves out in turn."""
MOST_AT_ONCE = 4_000_000
"""Numbers that a bootstrap holds at once."""
Values = Sequence[float] | np.ndarray
"""Independent observations, or rows of them that are only independent of each other's, such as the
images of a prompt: a bootstrap draws rows."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval and the number of observations that it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        """Writes `value [low, high]`, each by the format of a number; one of "%" is in percent.

        A format that ends in " n" adds the count: f"{estimate:+.2f n}" is
        "+0.12 [+0.05, +0.19] n = 30", f"{estimate:.1%}" is "12.0% [5.0, 19.0]".
        """
        form, _, count = spec.partition(" ")
        value, low, high = (f"{number:{form}}" for number in (self.value, self.low, self.high))
        interval = f"[{low.rstrip('%')}, {high.rstrip('%')}]"
        if not math.isfinite(self.low):
            interval = "[too few for an interval]"
        return f"{value} {interval}" + (f" n = {self.n}" if count else "")


def mean(values: Values, seed: int = 0) -> Estimate:
    """Estimates a mean, with a bootstrap interval; of one observation without (NaN).

    Of observations that are all equal the interval is that point: it knows no spread.
    """
    sample = checked_values(values, 1)
    value = float(sample.mean())
    if len(sample) == 1:
        return Estimate(value, math.nan, math.nan, 1)
    resampled = bootstrap(sample, lambda drawn: drawn.mean(axis=1), np.random.default_rng(seed))
    influence = sample.reshape(len(sample), -1).mean(axis=1) - value
    return Estimate(value, *bca_interval(value, resampled, [influence]), len(sample))


def mean_score(values: Values) -> Estimate:
    """Estimates a mean, of zeros and ones alone as the proportion that it is.

    A bootstrap of scores that are all 1 would leave no doubt; Wilson's interval does.
    """
    sample = checked_values(values, 1)
    if np.isin(sample, (0.0, 1.0)).all():
        return proportion(int(sample.sum()), len(sample))
    return mean(sample)


def std(values: Values, seed: int = 0) -> Estimate:
    """Estimates a standard deviation (divisor n - 1), with a bootstrap interval."""
    sample = checked_values(values, 2)
    resampled = bootstrap(sample, _deviation, np.random.default_rng(seed))
    value, influence = float(sample.std(ddof=1)), influences(_deviations_without(sample))
    return Estimate(value, *bca_interval(value, resampled, [influence]), len(sample))


def std_ratio(values: Values, reference: Values, seed: int = 0) -> Estimate:
    """Estimates std(values) / std(reference); both are resampled, independently. n counts
    `values`."""
    sample, base = checked_values(values, 2), checked_values(reference, 2)
    if base.std() == 0:
        raise UserError(
            "reference: its standard deviation is 0, so there is no ratio; give values that vary"
        )
    rng = np.random.default_rng(seed)
    above, below = bootstrap(sample, _deviation, rng), bootstrap(base, _deviation, rng)
    top, bottom = float(sample.std(ddof=1)), float(base.std(ddof=1))
    ratio = [
        influences(_deviations_without(sample) / bottom),
        influences(top / np.maximum(_deviations_without(base), 1e-12)),
    ]
    interval = bca_interval(top / bottom, above / np.maximum(below, 1e-12), ratio)
    return Estimate(top / bottom, *interval, len(sample))


def mean_ratio(values: Values, reference: Values, seed: int = 0) -> Estimate:
    """Estimates mean(values) / mean(reference) of pairs, which are drawn together."""
    pairs = np.stack([checked_values(values, 2), checked_values(reference, 2)], axis=1)
    top, bottom = pairs.mean(axis=0)
    if bottom == 0:
        raise UserError("reference: its mean is 0, so there is no ratio to it")

    def ratio(drawn: np.ndarray) -> np.ndarray:
        sums = drawn.reshape(len(drawn), -1, 2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[:, 0] / sums[:, 1]

    value = float(top / bottom)
    resampled = bootstrap(pairs, ratio, np.random.default_rng(seed))
    influence = (pairs[:, 0] - value * pairs[:, 1]) / bottom
    return Estimate(value, *bca_interval(value, resampled, [influence]), len(pairs))


def proportion(num_true: int, n: int) -> Estimate:
    """Estimates a proportion, with Wilson's score interval."""
    if not 0 <= num_true <= n or n == 0:
        raise UserError(f"proportion: {num_true} of {n} is none; 0 <= num_true <= n and n > 0")
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    share = num_true / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low = center - half if num_true > 0 else 0.0  # exact, where rounding would leave 1e-18
    high = center + half if num_true < n else 1.0
    return Estimate(share, max(0.0, low), min(1.0, high), n)


def paired_mean(differences: Values) -> Estimate:
    """Estimates the mean of a few paired differences, with the interval of Student's t."""
    sample = checked_values(differences, 2)
    return _student(float(sample.mean()), float(stats.sem(sample)), len(sample) - 1, len(sample))


def jackknife(value: float, left_out: Values, n: int) -> Estimate:
    """Gives a value the interval of a delete-a-group jackknife, with Student's t.

    left_out: the value without each of the groups; of fewer than three there is no interval (NaN).
    n: what the value rests on.
    """
    without, count = np.asarray(left_out, dtype=np.float64), len(left_out)
    if count < FEWEST_GROUPS:
        return Estimate(value, math.nan, math.nan, n)
    return _student(value, float(np.sqrt((count - 1) * without.var())), count - 1, n)


def influence_interval(value: float, derivatives: Values, n: int) -> Estimate:
    """Gives a value the interval of an infinitesimal jackknife, with Student's t (Efron 1982).

    derivatives: of the value by the weight of each group; of fewer than three there is no interval
    (NaN). n: what the value rests on.
    """
    slopes, count = np.asarray(derivatives, dtype=np.float64), len(derivatives)
    if count < FEWEST_GROUPS:
        return Estimate(value, math.nan, math.nan, n)
    error = float(np.sqrt(count / (count - 1) * (slopes**2).sum()))
    return _student(value, error, count - 1, n)


def smallest_detectable_effect(differences: Values) -> float:
    """Returns the mean difference that a two-sided paired t-test would find with power 0.8.

    It takes the spread of `differences` for the true one (noncentral t; Cohen 1988, chapter 2).
    """
    sample = checked_values(differences, 2)
    freedom = len(sample) - 1
    critical = stats.t.ppf(0.5 + LEVEL / 2, freedom)

    def missing(effect: float) -> float:  # the other tail holds nothing at such a power
        return float(stats.nct.sf(critical, freedom, effect) - POWER)

    largest = 1.0
    while missing(largest) < 0:  # scipy's tail is not a number far beyond the answer
        largest *= 1.5
    return float(optimize.brentq(missing, 0, largest)) * float(stats.sem(sample))


def checked_values(values: Values, smallest: int) -> np.ndarray:
    """Returns values as float64; raises UserError for fewer than `smallest` or not finite ones."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim not in (1, 2) or len(sample) < smallest:
        raise UserError(
            f"values: shape {sample.shape}; an interval needs at least {smallest} numbers in a row"
        )
    if not np.isfinite(sample).all():
        raise UserError(
            f"values: {(~np.isfinite(sample)).sum()} of {len(sample)} are not finite; "
            "look at the rows"
        )
    return sample


def bca_interval(
    value: float, resampled: np.ndarray, influence: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Returns the bias-corrected, accelerated interval of a bootstrap, expanded for small samples.

    resampled: the statistic of samples drawn with replacement; what is not finite is left out.
    influence: what each observation adds to the statistic, an array for each sample that was drawn
    by itself. Where no observation moves the statistic, or a leave-one-out value does not exist,
    nothing is accelerated. Resampled values that are all equal are the interval.
    """
    drawn = resampled[np.isfinite(resampled)]
    if len(drawn) == 0:
        return math.nan, math.nan
    sizes = np.array([len(parts) for parts in influence], dtype=np.float64)
    scaled = [parts / len(parts) for parts in influence]
    squares = np.array([float((parts**2).sum()) for parts in scaled])
    acceleration, freedom, expansion = 0.0, sizes.min() - 1, sizes.min() / (sizes.min() - 1)
    if np.isfinite(squares).all() and squares.sum() > 0:
        cubes = sum(float((parts**3).sum()) for parts in scaled)
        acceleration = cubes / (6 * float(squares.sum()) ** 1.5)
        variances = squares * sizes / (sizes - 1)  # the bootstrap's own are `squares`
        freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()  # Welch 1947
        expansion = variances.sum() / squares.sum()
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    bias = stats.norm.ppf(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    tail = _expanded_tail(freedom, expansion)
    levels = []
    for z in (bias - tail, bias + tail):
        shrink = 1 - acceleration * z
        levels.append(stats.norm.cdf(bias + z / shrink) if shrink > 0 else float(z > 0))
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def expanded_interval(resampled: np.ndarray, n: int) -> tuple[float, float]:
    """Returns the percentile interval of a bootstrap, expanded for a sample of n.

    For statistics that resampling itself biases, such as distances near 0: correcting for that bias
    would move the interval away from what the statistic is at this n.
    """
    tail = _expanded_tail(n - 1, n / (n - 1))
    low, high = np.quantile(resampled, stats.norm.cdf([-tail, tail]))
    return float(low), float(high)


def influences(left_out: Values) -> np.ndarray:
    """Returns the influence of n observations, from the statistic without each of them (n,)."""
    without = np.asarray(left_out, dtype=np.float64)
    return (len(without) - 1) * (without.mean() - without)


def _expanded_tail(freedom: float, expansion: float) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * expansion**0.5


def _student(value: float, error: float, freedom: int, n: int) -> Estimate:
    half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    return Estimate(value, value - half, value + half, n)


def bootstrap(
    sample: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> np.ndarray:
    """Returns a statistic of samples of the same size, drawn with replacement, (num_resamples,).

    sample: (n,), or (n, m) of which rows are drawn. statistic: from (k, n m) to (k,).
    """
    at_once = max(1, MOST_AT_ONCE // sample.size)
    values = []
    for start in range(0, num_resamples, at_once):
        count = min(at_once, num_resamples - start)
        drawn = sample[rng.integers(len(sample), size=(count, len(sample)))]
        values.append(statistic(drawn.reshape(count, -1)))
    return np.concatenate(values)


def _deviation(drawn: np.ndarray) -> np.ndarray:
    return drawn.std(axis=1, ddof=1)


def _deviations_without(sample: np.ndarray) -> np.ndarray:
    """Returns the standard deviation without each row; NaN where a single number is left."""
    rows = sample.reshape(len(sample), -1)
    rows = rows - rows.mean()
    count = rows.size - rows.shape[1]
    if count < 2:
        return np.full(len(rows), math.nan)
    sums, squares = rows.sum(axis=1), (rows**2).sum(axis=1)
    spread = squares.sum() - squares - (sums.sum() - sums) ** 2 / count
    return np.sqrt(np.maximum(spread, 0) / (count - 1))
