"""The first prediction's dependence on the noise, against closed forms."""

from pathlib import Path

import pytest
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.metrics.noise_invariance import noise_dependence
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from tests.search_problems import GaussianModel
from tests.toy_denoisers import SD, STD, ZERO_SNR


def test_an_ideal_zero_snr_model_does_not_look_at_the_noise() -> None:
    model = GaussianModel()
    assert model.process.schedule is ZERO_SNR
    found = noise_dependence(model, ["a", "b"], batch_size=5)  # type: ignore[arg-type]
    assert found.shape == (2,) and found.abs().max() < 1e-7


def test_an_ideal_model_of_a_schedule_that_leaks_follows_the_noise_as_the_closed_form_says() -> (
    None
):
    model = GaussianModel((4, 32, 32))
    model.process = Process(SD)
    alpha, sigma = SD.alpha[-1].item(), SD.sigma[-1].item()
    expected = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    [found] = noise_dependence(model, ["a"]).tolist()  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=0.02)


def test_it_runs_on_a_pipeline_and_batches_change_nothing(pipeline: Path) -> None:
    model = DiffusionModel.load(pipeline)
    one, other = (
        noise_dependence(model, ["a night"], num_noises=5, batch_size=size) for size in (2, 5)
    )
    assert torch.allclose(one, other, atol=1e-5) and one.item() > 0
    with pytest.raises(UserError, match="needs at least 2"):
        noise_dependence(model, ["a night"], num_noises=1)
