"""The oracle: torchmetrics' FID and IS of the set, and the greedy contribution of a candidate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.statistics.frechet import frechet_distance, gaussian_of
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models.image_model import ImageModel
from blackpoint.sampling.verifiers.oracle import Oracle, OracleConfig
from blackpoint.sampling.verifiers.reference import inception_score
from tests.tiny_vision import eight_bit_images, make_tiny_vit

CPU = torch.device("cpu")
NUM_FEATURES = 6
MODULE = "tests.test_verifiers_oracle:Means"


class Means(torch.nn.Module):
    """Six features of an image, the means of its halves' colours."""

    num_features = NUM_FEATURES

    def forward(self, images: Tensor) -> Tensor:
        """Returns (N, 6)."""
        left, right = images.float().chunk(2, dim=-1)
        return torch.cat([left.mean(dim=(2, 3)), right.mean(dim=(2, 3))], dim=1)


FEATURES = ImageModel(Means(), CPU, torch.float32)


def tinted(num_images: int, seed: int) -> Tensor:
    """Images whose halves differ in colour, so that the features vary."""
    colors = torch.rand(num_images, 3, 1, 2, generator=torch.Generator().manual_seed(seed))
    return colors.repeat_interleave(4, dim=-1).expand(-1, -1, 4, -1).contiguous()


def torchmetrics_fid(images: Tensor, reference: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=Means(), normalize=True, input_img_size=(3, 4, 8))
    metric.set_dtype(torch.float64)
    metric.update(reference, real=True)
    metric.update(images, real=False)
    return float(metric.compute())


@pytest.mark.parametrize("num_images", [2, 4, 7, 60])
def test_fid_is_that_of_torchmetrics(num_images: int) -> None:
    images, reference = tinted(num_images, 0), tinted(80, 1)
    expected = torchmetrics_fid(images, reference)
    found = frechet_distance(FEATURES(images), gaussian_of(FEATURES(reference)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_fid_of_one_image_has_no_covariance() -> None:
    reference = gaussian_of(FEATURES(tinted(50, 1)))
    row = FEATURES(tinted(1, 0)).double()
    expected = (row[0] - reference.mean).square().sum() + reference.covariance.trace()
    assert frechet_distance(row, reference) == pytest.approx(float(expected))


def test_fid_to_itself_is_nothing() -> None:
    rows = FEATURES(tinted(30, 0))
    assert frechet_distance(rows, gaussian_of(rows)) == pytest.approx(0, abs=1e-9)


def test_is_is_that_of_torchmetrics() -> None:
    logits = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    metric = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    metric.update(logits[:, :, None, None])
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-5)
    assert inception_score(logits[:1]) == pytest.approx(1)


def test_a_contribution_is_what_the_set_gains() -> None:
    reference = gaussian_of(FEATURES(tinted(50, 1)))
    oracle = Oracle(FEATURES, reference, OracleConfig("oracle", batch_size=2))
    images = tinted(9, 0)
    assert not oracle.differentiable
    for n in range(3):
        before = frechet_distance(FEATURES(images[:n]), reference) if n else 0.0
        scores = oracle.score(images[3:], [""] * 6)
        for row, score in enumerate(scores.tolist()):
            together = torch.cat([images[:n], images[3 + row : 4 + row]])
            after = frechet_distance(FEATURES(together), reference)
            assert score == pytest.approx((n + 1) * (before - after), abs=1e-9)
        oracle.keep(images[n])


def test_searching_with_the_oracle_beats_taking_what_comes() -> None:
    reference = gaussian_of(FEATURES(tinted(200, 1)))
    oracle = Oracle(FEATURES, reference, OracleConfig("oracle"))
    searched, first = [], []
    for number in range(12):
        candidates = tinted(8, 100 + number)
        searched.append(candidates[oracle.score(candidates, [""] * 8).argmax()])
        first.append(candidates[0])
        oracle.keep(searched[-1])
    of_searched, of_first = (
        frechet_distance(FEATURES(torch.stack(images)), reference) for images in (searched, first)
    )
    assert of_searched < of_first / 2


def test_inception_score_prefers_a_class_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = make_tiny_vit(tmp_path)
    config = VerifierConfig(kind="oracle", metric="is", checkpoint=str(folder))
    oracle: Any = load_verifier(config, CPU)
    images = eight_bit_images(3, 32, 32)
    assert_close(oracle.score(images, [""] * 3), torch.zeros(3).double(), atol=1e-5, rtol=0)
    oracle.keep(images[0])
    again, other, _ = oracle.score(images, [""] * 3)
    assert other > again and again == pytest.approx(0, abs=1e-5)


def test_the_reference_is_a_folder_of_pictures_or_statistics(tmp_path: Path) -> None:
    pictures = (tinted(12, 1) * 255).round().to(torch.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    config = VerifierConfig(kind="oracle", module=MODULE, reference=str(tmp_path))
    images = tinted(3, 0)
    scores = load_verifier(config, CPU).score(images, [""] * 3)
    known = gaussian_of(FEATURES(pictures / 255))
    oracle = Oracle(FEATURES, known, OracleConfig("oracle"))
    assert_close(scores, oracle.score(images, [""] * 3), atol=1e-5, rtol=0)

    statistics = tmp_path / "statistics.safetensors"
    save_file({"mean": known.mean, "covariance": known.covariance}, statistics)
    config.reference = str(statistics)
    assert_close(load_verifier(config, CPU).score(images, [""] * 3), scores, atol=1e-5, rtol=0)


def test_a_wrong_reference_says_why(tmp_path: Path) -> None:
    def load(path: Path) -> Any:
        return load_verifier(VerifierConfig(kind="oracle", module=MODULE, reference=str(path)), CPU)

    with pytest.raises(UserError, match="holds 0 pictures.*give a folder of many, or"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist; give statistics or a folder"):
        load(tmp_path / "none.safetensors")
    save_file({"mean": torch.zeros(2)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="holds mean; it must hold mean"):
        load(tmp_path / "half.safetensors")
    save_file({"mean": torch.zeros(2), "covariance": torch.eye(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="of 2 features and this model gives 6"):
        load(tmp_path / "two.safetensors").score(tinted(1, 0), [""])
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a.png is not a picture .* take it away"):
        load(tmp_path)
