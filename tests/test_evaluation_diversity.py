"""Diversity: equality with scipy's distances, the bootstrap over prompts, and refusals."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from blackpoint.sampling.statistics import diversity
from blackpoint.sampling.statistics.diversity import diversity_change, mean_pairwise_distance
from blackpoint.sampling.statistics.estimates import bca_interval, influences

FEATURES = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def test_distance_is_scipys_mean_over_pairs(monkeypatch) -> None:
    expected = pdist(FEATURES.numpy().astype(float)).mean()
    assert mean_pairwise_distance(FEATURES) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(diversity, "BLOCK_PAIRS", 60)  # three rows at a time
    assert mean_pairwise_distance(FEATURES) == pytest.approx(expected, rel=1e-12)


def test_equal_images_have_no_diversity() -> None:
    assert mean_pairwise_distance(FEATURES[:1].repeat(40, 1) * 1e3) == 0


def test_change_of_diversity_is_paired_by_prompt(monkeypatch) -> None:
    monkeypatch.setattr(diversity, "NUM_RESAMPLES", 40)
    winners = 0.5 * FEATURES + 1
    found = diversity_change(winners, FEATURES, seed=3)
    half = 0.5 * mean_pairwise_distance(FEATURES)
    assert found.value == pytest.approx(-half)
    assert found.n == 20
    changes = []
    for row in np.random.default_rng(3).multinomial(20, np.full(20, 1 / 20), size=40):
        drawn = np.repeat(np.arange(20), row)
        different = drawn[:, None] != drawn
        sample = FEATURES[drawn].double()
        changes.append(-0.5 * torch.cdist(sample, sample)[torch.from_numpy(different)].mean())
    left_out = [
        -0.5 * mean_pairwise_distance(torch.cat([FEATURES[:place], FEATURES[place + 1 :]]))
        for place in range(20)
    ]
    expected = bca_interval(found.value, np.array(changes), [influences(left_out)])
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.high < 0
    same = diversity_change(FEATURES, FEATURES)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_change_of_two_prompts_leaves_samples_of_one_out() -> None:
    found = diversity_change(FEATURES[:2], 2 * FEATURES[:2])
    assert found.low == pytest.approx(found.value) and found.high == pytest.approx(found.value)
