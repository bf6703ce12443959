"""FID, KID, IS, precision and recall of rows equal torchmetrics and torch-fidelity on images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.metric import FEATURE_COLUMN, LOGIT_COLUMN, Metric
from blackpoint.sampling.evaluation.metrics.set_metrics import (
    ball_counts,
    feature_metrics,
    jackknife_parts,
    logit_metrics,
    num_splits,
)
from blackpoint.sampling.evaluation.metrics.set_models import load_set_model, read_reference
from blackpoint.sampling.evaluation.metrics.sets import SetsConfig
from blackpoint.sampling.statistics.frechet import frechet_distance, gaussian_of
from blackpoint.sampling.statistics.kernel_distance import distances_without, kernel_distance
from blackpoint.sampling.verifiers.load import ImageModelConfig
from blackpoint.sampling.verifiers.reference import inception_score
from tests.tiny_vision import ThreeColors, eight_bit_images

CPU = torch.device("cpu")


class Colors(nn.Module):
    """Means and deviations of the three channels of images in [0, 1]."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def images(count: int, seed: int, low: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = low + (1 - low) * torch.rand(count, 3, 1, 1, generator=generator)
    return level * torch.rand(count, 3, 8, 8, generator=generator)


def by_name(found: list[Metric]) -> dict[str, Metric]:
    return {each.name: each for each in found}


def test_fid_and_kid_are_torchmetrics_own() -> None:
    fake, real = images(60, 0), images(80, 1, 0.3)
    fid = FrechetInceptionDistance(feature=Colors())
    kid = KernelInceptionDistance(feature=Colors(), subsets=7, subset_size=50)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    torch.manual_seed(5)
    expected_kid = float(kid.compute()[0])
    config = SetsConfig(reference="real", kid_subsets=7, kid_subset_size=50)
    network = Colors()
    groups = np.arange(60) // 2
    found = by_name(feature_metrics(network(fake), network(real), groups, config, seed=5))
    assert found["FID"].estimate.value == pytest.approx(float(fid.compute()), rel=1e-4)
    oracle = frechet_distance(network(fake), gaussian_of(network(real)))
    assert found["FID"].estimate.value == pytest.approx(oracle, rel=1e-9)
    assert found["KID"].estimate.value == pytest.approx(expected_kid, rel=1e-4, abs=1e-6)
    for name in ("FID", "KID"):
        estimate = found[name].estimate
        assert estimate.low < estimate.value < estimate.high and estimate.n == 60
    assert (found["FID"].better, found["precision"].better) == ("lower", "higher")


def test_the_inception_score_is_torchmetrics_own() -> None:
    pictures = images(50, 0)
    metric = InceptionScore(feature=ThreeColors(), splits=1)
    metric.update(pictures)
    torch.manual_seed(3)
    expected = float(metric.compute()[0])
    config = SetsConfig(inception_score_splits=1)
    [found] = logit_metrics(ThreeColors()(pictures), range(50), config, seed=3)
    assert found.estimate.value == pytest.approx(expected, rel=1e-5)  # theirs is in float32
    assert found.estimate.low < expected < found.estimate.high


def classes(count: int, num_classes: int, seed: int = 0) -> torch.Tensor:
    """Logits of a sure classifier on images of all classes alike, whose true score is k."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_classes, (count,), generator=generator)
    return 20 * nn.functional.one_hot(drawn, num_classes).float()


@pytest.mark.parametrize("count", [19, 20, 100, 999, 1000])
def test_the_inception_score_does_not_fall_where_splits_begin(count: int) -> None:
    """Ten splits of n / 10 images bound it by n / 10. The logarithm of one split of n falls short
    by chi2 / (2 n) with k - 1 degrees of freedom: .24 +- .11 at 19, .045 +- .021 at 100."""
    config, size = SetsConfig(), count // num_splits(count, 10, 10)
    assert num_splits(count, 10, 10) == (10 if count == 1000 else 1)
    [found] = logit_metrics(classes(count, 10), range(count), config)
    own = found.estimate
    lack = 9 / (2 * size)
    assert -math.log(own.value / 10) == pytest.approx(lack, abs=5 * 18**0.5 / (2 * size))
    assert 1 <= own.low <= own.value <= own.high <= 10
    metric = InceptionScore(feature=nn.Identity(), splits=num_splits(count, 10, 10))
    metric.inception.num_features = 10
    metric.update(classes(count, 10))
    torch.manual_seed(0)
    assert own.value == pytest.approx(float(metric.compute()[0]), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.01, 5.0])
def test_the_interval_of_the_inception_score_stays_within_its_bounds(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (3, 12, 40, 250):
        logits = scale * torch.randn(count, 4, generator=generator)
        [found] = logit_metrics(logits, range(count), SetsConfig(inception_score_splits=2))
        low, value, high = found.estimate.low, found.estimate.value, found.estimate.high
        assert 1 <= low <= value + 1e-9 and value <= high + 1e-9 and high <= 4


def test_what_is_left_out_of_the_inception_score_is_left_out_of_its_splits() -> None:
    """Value and interval rest on one estimator, the mean over the splits of the whole set."""
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    assert num_splits(400, 4, 10) == 10 and num_splits(399, 4, 10) == 1
    [ten] = logit_metrics(logits, range(400), SetsConfig(inception_score_splits=10), seed=7)
    torch.manual_seed(7)
    split_of = torch.empty(400, dtype=torch.long)
    split_of[torch.randperm(400)] = torch.arange(400) // 40
    part_of = torch.arange(400) % 20
    left_out = [
        np.mean([inception_score(logits[(split_of == s) & (part_of != p)]) for s in range(10)])
        for p in range(20)
    ]
    half = 2.093024 * np.sqrt(19 * np.log(left_out).var())  # t of 19 degrees of freedom
    own = ten.estimate
    assert (own.low, own.high) == pytest.approx(
        (own.value * math.exp(-half), own.value * math.exp(half)), rel=1e-6
    )


def test_precision_and_recall_know_a_narrow_set_from_a_wide_one() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 4, generator=generator)
    narrow = 0.2 * torch.randn(200, 4, generator=generator)
    found = by_name(feature_metrics(narrow, real, range(200), SetsConfig(reference="real")))
    assert found["precision"].estimate.value > 0.95
    assert found["recall"].estimate.value < 0.3
    far = by_name(feature_metrics(narrow + 50, real, range(200), SetsConfig(reference="real")))
    for name in ("precision", "recall"):  # none of 200 leaves doubt
        none = far[name].estimate
        assert (none.value, none.low) == (0, 0) and 0.01 < none.high < 0.03
        assert 0 <= found[name].estimate.low <= found[name].estimate.high <= 1


def test_the_interval_covers_what_other_sets_of_that_size_have() -> None:
    """Jackknife: of 40 sets of one distribution, most have the mean of all in their interval."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 3, generator=generator).double()
    config = SetsConfig(reference="real", kid_subset_size=100, kid_subsets=1)
    found = [
        by_name(
            feature_metrics(
                torch.randn(100, 3, generator=generator) + 0.3, real.float(), range(100), config
            )
        )["FID"].estimate
        for _ in range(40)
    ]
    mean = float(np.mean([each.value for each in found]))
    assert sum(each.low <= mean <= each.high for each in found) >= 32


def test_what_is_left_out_is_left_out() -> None:
    """Sums that are taken once give what a set without those rows has."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(600, 5, generator=generator).double() + 0.4
    real = torch.randn(700, 5, generator=generator).double()
    parts = jackknife_parts(np.arange(600) // 7)
    assert len(parts) == 20 and sorted(np.concatenate(parts)) == list(range(600))
    inside, covers = ball_counts(own, real, 3, parts)
    balls = torch.cdist(own, real) <= torch.cdist(own, own).kthvalue(4).values[:, None]
    for number, found in enumerate(distances_without(own, real, parts)):
        kept = np.setdiff1d(np.arange(600), parts[number])
        assert found == pytest.approx(kernel_distance(own[kept], real), rel=1e-9)
        covered = covers.sum(axis=0) > covers[number]
        assert (covered == balls[kept].any(dim=0).numpy()).all()
    expected = prc_features_to_metric(
        own, real, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    assert inside.mean() == pytest.approx(expected["precision"])
    assert (covers.sum(axis=0) > 0).mean() == pytest.approx(expected["recall"])


@pytest.mark.parametrize("count", [0, 1])
def test_a_set_has_two_images(count: int) -> None:
    rows = torch.zeros(count, 3)
    with pytest.raises(UserError, match=f"{count} generated image"):
        feature_metrics(rows, torch.zeros(5, 3), range(count), SetsConfig(reference="real"))
    with pytest.raises(UserError, match=f"{count} reference image"):
        feature_metrics(torch.zeros(5, 3), rows, range(5), SetsConfig(reference="real"))
    with pytest.raises(UserError, match=f"{count} image"):
        logit_metrics(rows, range(count), SetsConfig())


def test_sets_too_small_for_an_interval_have_none() -> None:
    config = SetsConfig(reference="real")
    found = by_name(feature_metrics(torch.eye(2), torch.eye(3)[:, :2], [0, 0], config))
    assert math.isnan(found["FID"].estimate.low) and set(found) == {"FID", "KID"}


def test_references_of_another_size_are_resized_and_cut(tmp_path: Path) -> None:
    from torchvision.transforms.functional import to_pil_image

    wide = torch.zeros(3, 20, 60)
    wide[:, :, 20:40] = 1.0  # the middle third is white
    to_pil_image(wide).save(tmp_path / "wide.png")
    pixels, is_other = read_reference(tmp_path / "wide.png", 10, 10)
    assert is_other and pixels.shape == (1, 3, 10, 10)
    assert int(pixels.float().mean()) > 245  # Lanczos rings at the two edges
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="text.png is not a picture"):
        read_reference(tmp_path / "text.png", 10, 10)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the published network's shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        name = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
        patch.setattr(f"{name}", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_the_network_of_torchmetrics(inception: Path) -> None:
    sets = SetsConfig(reference="real", inception=str(inception))
    assert sets.networks() == {"inception": (FEATURE_COLUMN, LOGIT_COLUMN)}
    assert SetsConfig(inception="file").networks() == {"inception": (LOGIT_COLUMN,)}
    own = SetsConfig(inception="file", classifier=ImageModelConfig(module="a:b"), reference="real")
    assert own.networks() == {"classifier": (LOGIT_COLUMN,), "inception": (FEATURE_COLUMN,)}
    model = load_set_model(sets, "inception", (FEATURE_COLUMN, LOGIT_COLUMN), CPU)
    pixels = (255 * eight_bit_images(2, 16, 16)).round().to(torch.uint8)
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(inception))
    rows = model.rows(pixels)
    assert [tuple(each.shape) for each in rows] == [(2, 2048), (2, 1008)]
    assert_close(rows[0], metric.inception(pixels), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_with_inception_is_said(tmp_path: Path, inception: Path) -> None:
    def load(path: Path) -> None:
        load_set_model(SetsConfig(inception=str(path)), "inception", (LOGIT_COLUMN,), CPU)

    with pytest.raises(UserError, match="weights-inception-2015-12-05-6726825d.pth"):
        load(tmp_path / "absent.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other weights than Inception's"):
        load(tmp_path / "other.pth")
