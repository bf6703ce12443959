"""Estimates: published values, closed forms, coverage, and refusal of what has no interval."""

import numpy as np
import pytest

from sampling.errors import UserError
from sampling.evaluation import statistics


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


def test_difference_interval_has_newcombes_published_values() -> None:
    """Newcombe 1998, Statistics in Medicine 17:873, table II, method 10."""
    for first, second, low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0000),
    ):
        found = statistics.proportion_difference(*first, *second)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    found = statistics.mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.1 * half
    )
    assert found == statistics.mean(values)  # seeded


def test_std_ratio_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        found = statistics.std_ratio(rng.normal(0, 0.8, 120), rng.uniform(-(3**0.5), 3**0.5, 300))
        covered += found.low <= 0.8 <= found.high
    assert covered >= 86  # 95 expected; fewer than 86 of 100 happens once in 10,000
    assert statistics.std([0.0, 1.0]).value == pytest.approx(0.5**0.5)


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
