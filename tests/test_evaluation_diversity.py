"""Diversity: equality with scipy's distances, batches, the bootstrap over prompts, and refusals."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import nn

from data.files.errors import RunFailed, UserError
from sampling.evaluation import diversity
from sampling.evaluation.diversity import (
    diversity_change,
    extract_features,
    mean_pairwise_distance,
)
from sampling.evaluation.statistics import bca_interval, influences

FEATURES = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def small_extractor() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2)
    )


def test_distance_is_scipys_mean_over_pairs(monkeypatch) -> None:
    expected = pdist(FEATURES.numpy().astype(float)).mean()
    assert mean_pairwise_distance(FEATURES) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(diversity, "BLOCK_PAIRS", 60)  # three rows at a time
    assert mean_pairwise_distance(FEATURES) == pytest.approx(expected, rel=1e-12)


def test_equal_images_have_no_diversity() -> None:
    assert mean_pairwise_distance(FEATURES[:1].repeat(40, 1) * 1e3) == 0


def test_features_do_not_depend_on_the_batch_and_leave_the_module_as_it_was() -> None:
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    extractor = small_extractor().train()
    extractor[1].eval()
    whole = extract_features(extractor, images)
    torch.testing.assert_close(
        extract_features(extractor, list(images), 3), whole, atol=1e-5, rtol=0
    )
    assert [module.training for module in extractor.modules()] == [True, True, False, True, True]
    assert whole.shape == (7, 16) and whole.dtype == torch.float64 and not whole.requires_grad
    torch.testing.assert_close(
        whole, extractor.eval()(images).flatten(1).double(), atol=1e-5, rtol=0
    )


def test_images_take_the_number_format_of_the_module() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert extract_features(small_extractor(), images).shape == (2, 16)
    assert extract_features(nn.Flatten(), images).shape == (2, 192)


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


def test_bad_input_is_refused() -> None:
    images = torch.rand(2, 3, 8, 8)
    for given, message in (
        ([], "0 sizes among 0"),
        ([images[0], torch.rand(3, 4, 4)], "2 sizes among 2; give at least one image, all of one"),
    ):
        with pytest.raises(UserError, match=message):
            extract_features(nn.Flatten(), given)
    with pytest.raises(UserError, match="batch_size=0 must be at least 1; 64"):
        extract_features(nn.Flatten(), images, 0)
    with pytest.raises(UserError, match=r"shape \(1, 5\); a distance needs two rows"):
        mean_pairwise_distance(FEATURES[:1])
    with pytest.raises(UserError, match="20 and 19 rows are no pairs; give one image a prompt"):
        diversity_change(FEATURES, FEATURES[1:])


class Answers(nn.Module):
    """Returns the same whatever the images."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: torch.Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"pooled": 1}, r"extractor Answers returned dict for 2 images; .*wrap it"),
        (torch.zeros(3, 4), r"extractor Answers returned \(3, 4\) for 2 images"),
        (torch.zeros(()), r"extractor Answers returned \(\) for 2 images"),
        (torch.full((2, 4), float("inf")), "features that are not finite; look at the images"),
    ],
)
def test_extractors_that_answer_wrongly_are_named(answer: object, message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        extract_features(Answers(answer), torch.rand(2, 3, 8, 8))
