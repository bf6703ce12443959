"""Paired comparisons: equality with scipy, exact counts, Holm's laws, and refusals."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.statistics.estimates import mean
from blackpoint.sampling.statistics.paired import count_outcomes, holm, mean_difference

RNG = np.random.default_rng(0)
BASELINE = RNG.normal(5, 2, 80)
VALUES = BASELINE + RNG.normal(0.3, 0.5, 80)


def test_difference_is_paired_and_agrees_with_scipys_bootstrap() -> None:
    found = mean_difference(VALUES, BASELINE)
    reference = stats.bootstrap(
        (VALUES, BASELINE),
        lambda a, b, axis: (a - b).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.value == pytest.approx(VALUES.mean() - BASELINE.mean())
    assert found.n == 80
    width = reference.high - reference.low
    assert (found.low, found.high) == pytest.approx(tuple(reference), abs=0.06 * width)
    assert width < 0.3 * (mean(VALUES).high - mean(VALUES).low)  # what pairing is for
    assert found == mean_difference(VALUES, BASELINE)  # seeded


def test_ties_are_scores_equal_after_rounding() -> None:
    baseline = [0.5, 0.5, 0.5, 0.5, 0.5]
    found = count_outcomes([0.50004, 0.49996, 0.5002, 0.7, 0.4], baseline)
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)
    assert found.p_value == 1


@pytest.mark.parametrize(("wins", "ties", "losses"), [(9, 0, 1), (3, 5, 0), (0, 1, 7), (40, 9, 60)])
def test_the_test_is_exact_and_ignores_ties(wins: int, ties: int, losses: int) -> None:
    signs = [1.0] * wins + [0.0] * ties + [-1.0] * losses
    found = count_outcomes(signs, np.zeros(len(signs)))
    assert (found.wins, found.ties, found.losses) == (wins, ties, losses)
    expected = stats.binomtest(wins, wins + losses)
    assert found.p_value == expected.pvalue
    # two-sided and symmetric: twice the smaller tail, at most 1
    tail = stats.binom.cdf(min(wins, losses), wins + losses, 0.5)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_ties_alone_decide_nothing() -> None:
    found = count_outcomes([1.0, 2.0], [1.0, 2.0])
    assert (found.wins, found.ties, found.losses, found.p_value) == (0, 2, 0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values, alpha) -> None:
    found = holm({str(place): p for place, p in enumerate(p_values)})
    assert list(found) == [str(place) for place in range(len(p_values))]
    ordered = sorted(range(len(p_values)), key=lambda place: p_values[place])
    rejected = set()
    for rank, place in enumerate(ordered):
        if p_values[place] * (len(p_values) - rank) > alpha:
            break
        rejected.add(str(place))
    assert {name for name, p in found.items() if p <= alpha} == rejected


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """A hypothesis is rejected if every intersection that holds it is (Marcus et al. 1976)."""
    p_values = dict(zip("abcde", np.random.default_rng(3).uniform(0, 0.2, 5), strict=True))
    found = holm(p_values)
    for name in p_values:
        subsets = itertools.chain.from_iterable(
            itertools.combinations(p_values, size) for size in range(1, 6)
        )
        closed = [len(s) * min(p_values[k] for k in s) for s in subsets if name in s]
        assert found[name] == pytest.approx(min(1.0, max(closed)))


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        count_outcomes([float("nan")], [1.0])
