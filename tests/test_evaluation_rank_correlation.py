"""Rank correlations: equality with scipy, also of each bootstrap sample, and coverage."""

import numpy as np
import pytest
from scipy import stats

from data.files.errors import UserError
from sampling.evaluation import rank_correlation
from sampling.evaluation.rank_correlation import kendall, spearman
from sampling.evaluation.statistics import bca_interval, influences


def scores(n: int, seed: int, correlation: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Draws two correlated scores with ties, as rounding leaves them."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=n)
    second = correlation * first + (1 - correlation**2) ** 0.5 * rng.normal(size=n)
    return first.round(1), second.round(1)


def test_values_are_scipys() -> None:
    first, second = scores(50, 0)
    assert spearman(first, second).value == stats.spearmanr(first, second).statistic
    assert kendall(first, second).value == stats.kendalltau(first, second).statistic
    assert kendall(first, second).n == spearman(first, second).n == 50


@pytest.mark.parametrize("blocks", [1, 7])
def test_intervals_are_those_of_scipys_statistic_on_every_sample(monkeypatch, blocks: int) -> None:
    n, num_resamples = 12, 60
    monkeypatch.setattr(rank_correlation, "NUM_RESAMPLES", num_resamples)
    monkeypatch.setattr(rank_correlation, "BLOCK_PAIRS", n * n // blocks)
    first, second = scores(n, 1)
    counts = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), size=num_resamples)
    taus = [
        stats.kendalltau(np.repeat(first, row), np.repeat(second, row)).statistic for row in counts
    ]
    found = kendall(first, second, seed=5)
    others = [np.delete(np.arange(n), place) for place in range(n)]
    left_out = [stats.kendalltau(first[own], second[own]).statistic for own in others]
    expected = bca_interval(found.value, np.array(taus), [influences(left_out)])
    assert (found.low, found.high) == pytest.approx(expected)
    drawn = np.random.default_rng(5).integers(n, size=(num_resamples, n))
    rhos = [stats.spearmanr(first[row], second[row]).statistic for row in drawn]
    found = spearman(first, second, seed=5)
    left_out = [stats.spearmanr(first[own], second[own]).statistic for own in others]
    expected = bca_interval(found.value, np.array(rhos), [influences(left_out)])
    assert (found.low, found.high) == pytest.approx(expected)


def test_intervals_cover_the_true_correlation(monkeypatch) -> None:
    """For normal scores tau = 2/pi asin(r) and rho = 6/pi asin(r/2)."""
    monkeypatch.setattr(rank_correlation, "NUM_RESAMPLES", 200)
    covered = np.zeros(2)
    for seed in range(100):
        first, second = scores(60, seed)
        for place, (found, true) in enumerate(
            (
                (kendall(first, second), 2 / np.pi * np.arcsin(0.6)),
                (spearman(first, second), 6 / np.pi * np.arcsin(0.3)),
            )
        ):
            covered[place] += found.low <= true <= found.high
    assert (covered >= 85).all()  # 95 expected; fewer than 85 of 100 happens once in 20,000


def test_equal_and_opposite_orders_are_the_ends() -> None:
    values = np.arange(10.0)
    for correlation in (kendall, spearman):
        same, opposite = correlation(values, values**3), correlation(values, -values)
        assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
        assert (opposite.value, opposite.low, opposite.high) == pytest.approx((-1, -1, -1))


def test_samples_without_a_correlation_are_left_out() -> None:
    found = kendall([0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0])  # a third of samples are constant
    assert -1 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("correlation", [kendall, spearman])
def test_what_has_no_rank_correlation_is_refused(correlation) -> None:
    with pytest.raises(UserError, match="of 3 and 4 scores: they are no pairs; give both"):
        correlation([1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(UserError, match="the same for all: it has no ranks; give scores that vary"):
        correlation([1, 1, 1], [1, 2, 3])
    with pytest.raises(UserError, match="at least 3"):
        correlation([1, 2], [1, 2])
