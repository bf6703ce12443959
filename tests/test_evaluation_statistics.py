"""Estimates: published values, closed forms, coverage, and refusal of what has no interval."""

import numpy as np
import pytest
from scipy import stats

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.scripts.measurements.measure_intervals import DISTRIBUTIONS


def test_wilson_interval_has_newcombes_published_values() -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    for num_true, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        found = statistics.proportion(num_true, n)
        assert found.n == n and found.value == num_true / n
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    found = statistics.mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.1 * half
    )
    assert found == statistics.mean(values)  # seeded


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("name", ["normal", "lognormal, sigma 1/2", "0, 1/2, 1 with .1, .2, .7"])
def test_the_interval_of_a_mean_covers_it(name: str, n: int) -> None:
    """Of 400 intervals that cover with .95 (.90 for the skewed one, whose tail a sample of so few
    often lacks), fewer than the bound do so once in 1,000: 365 (340). Of percentile intervals of 10
    normal or discrete values 364 and 343 did."""
    draw, truth, _ = DISTRIBUTIONS[name]
    rng = np.random.default_rng(n)
    found = [statistics.mean(draw(rng, n)) for _ in range(400)]
    nominal = 0.90 if name.startswith("lognormal") else 0.95
    covered = sum(each.low <= truth <= each.high for each in found)
    assert covered >= stats.binom.ppf(1e-3, 400, nominal)


def test_the_interval_is_scipys_bca_at_a_wider_level() -> None:
    """BCa at level 2 Phi(sqrt(n / (n - 1)) t) - 1 of the same resamples; quantiles are scipy's."""
    values = np.random.default_rng(0).lognormal(size=15)
    tail = (15 / 14) ** 0.5 * stats.t.ppf(0.975, 14)
    level = 2 * stats.norm.cdf(tail) - 1
    theirs = stats.bootstrap(
        (values,), np.mean, method="BCa", confidence_level=level, n_resamples=3000, rng=0
    )
    influence = values - values.mean()
    ours = statistics.bca_interval(values.mean(), theirs.bootstrap_distribution, [influence])
    assert ours == pytest.approx(tuple(theirs.confidence_interval), rel=1e-3)


@pytest.mark.parametrize("values", [[0.2, 0.9], [0.0, 0.0, 1.0], [1.0] * 9 + [0.0], [-1e9, 0, 1e9]])
def test_small_and_lopsided_samples_have_an_interval_within_their_range(
    values: list[float],
) -> None:
    for found in (statistics.mean(values), statistics.std(values)):
        assert found.low <= found.value <= found.high
    own = statistics.mean(values)
    assert min(values) <= own.low and own.high <= max(values)


def test_std_ratio_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        found = statistics.std_ratio(rng.normal(0, 0.8, 120), rng.uniform(-(3**0.5), 3**0.5, 300))
        covered += found.low <= 0.8 <= found.high
    assert covered >= 86  # 95 expected; fewer than 86 of 100 happens once in 10,000
    assert statistics.std([0.0, 1.0]).value == pytest.approx(0.5**0.5)


def test_a_ratio_of_means_is_paired_and_covers_the_true_one() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        gain = rng.normal(2, 1, 80)
        found = statistics.mean_ratio(0.7 * gain + rng.normal(0, 0.3, 80), gain)
        covered += found.low <= 0.7 <= found.high
        assert found.high - found.low < 0.2  # unpaired it would be about .3
    assert covered >= 86  # as above
    exact = statistics.mean_ratio(0.5 * gain, gain)
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="mean is 0"):
        statistics.mean_ratio([1.0, 2.0], [1.0, -1.0])


def test_constant_values_have_a_point_interval() -> None:
    found = statistics.std_ratio([0.5] * 10, [0.0, 1.0] * 10)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert statistics.mean([0.25] * 2).low == statistics.mean([0.25] * 2).high == 0.25


def test_one_observation_has_no_interval() -> None:
    found = statistics.mean([0.25])
    assert found.value == 0.25 and np.isnan([found.low, found.high]).all() and found.n == 1


def test_rows_that_belong_together_are_drawn_together() -> None:
    """Ten copies of each value say no more than one: the interval does not shrink."""
    values = np.random.default_rng(0).normal(size=40)
    copies = np.repeat(values[:, None], 10, axis=1)
    for estimate in (statistics.mean, statistics.std):
        alone, together = estimate(values), estimate(copies)
        apart = estimate(copies.ravel())
        assert together.n == 40
        assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.05)
        assert apart.high - apart.low < 0.5 * (together.high - together.low)


def test_a_bootstrap_in_parts_has_the_same_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = statistics.mean(values)
    monkeypatch.setattr(statistics, "MOST_AT_ONCE", 1000)
    parts = statistics.mean(values)
    assert parts.high - parts.low == pytest.approx(whole.high - whole.low, rel=0.1)


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        statistics.mean([])
    with pytest.raises(UserError, match="1 of 2 are not finite"):
        statistics.mean([0.0, float("nan")])
    with pytest.raises(UserError, match="no ratio"):
        statistics.std_ratio([0.0, 1.0], [2.0, 2.0])
    with pytest.raises(UserError, match="3 of 2"):
        statistics.proportion(3, 2)


def test_scores_of_zero_and_one_are_proportions() -> None:
    """Sixty of sixty leave doubt, which a bootstrap of ones does not show."""
    assert statistics.mean_score([1.0] * 60) == statistics.proportion(60, 60)
    assert statistics.mean_score([1.0] * 60).low < 0.95
    values = [0.0, 0.5, 1.0]
    assert statistics.mean_score(values) == statistics.mean(values)
