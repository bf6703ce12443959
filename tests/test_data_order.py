"""Laws of the order in which samples are read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackpoint.data.order.permutation import permute


@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(n, size, seed, epoch) for n in range(size)) == list(range(size))


@given(st.integers(1, 10**12), st.integers(0, 2**32), st.data())
@settings(deadline=None)
def test_places_of_a_huge_data_set_stay_inside_and_apart(size, seed, source) -> None:
    places = source.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=20))
    values = [permute(n, size, seed, 0) for n in places]
    assert len(set(values)) == len(places)
    assert all(0 <= value < size for value in values)


def test_order_differs_by_seed_and_epoch_and_is_pinned() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [permute(n, 100, seed, epoch) for n in range(100)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0) != order(0, 0)
    # A run resumed after an update of this code must read on in the same order.
    assert order(0, 0)[:8] == [42, 69, 94, 16, 58, 81, 34, 80]


@pytest.mark.parametrize("size", [2, 3, 7, 64, 1000])
def test_every_place_is_equally_likely(size: int) -> None:
    num_seeds = 4000
    first = np.bincount([permute(0, size, seed, 0) for seed in range(num_seeds)], minlength=size)
    expected = num_seeds / size
    # Chi square has mean size - 1 and variance 2 (size - 1): 5 standard deviations.
    chi_square = ((first - expected) ** 2 / expected).sum()
    assert chi_square < size - 1 + 5 * np.sqrt(2 * (size - 1)) + 5


def test_neighbours_do_not_stay_neighbours() -> None:
    order = np.array([permute(n, 10_000, 5, 0) for n in range(10_000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.04
