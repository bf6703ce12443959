"""Options of the loss on SDXL, in buckets: multi-scale, shift, learned uncertainty."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.test_data_buckets import write_images
from tests.test_train_lora import without_exports
from tests.tiny_run import tiny_config, tiny_tuner
from tests.tiny_sdxl import make_tiny_sdxl

BUCKETS: dict[str, Any] = {"data.buckets.enabled": True, "data.buckets.step_px": 8}
MULTI_SCALE: dict[str, Any] = {"loss.pool_factors": [1, 2, 4]}
SHIFT: dict[str, Any] = {"schedule.shift.base_resolution": 8}
UNCERTAINTY: dict[str, Any] = {"loss.uncertainty": True}
NUM_BATCHES = 8


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("rectangles"), 20)


def tuner_of(sdxl: Path, rectangles: Path, options: dict[str, Any]) -> FineTuner:
    return tiny_tuner(sdxl, **{"data.shards": str(rectangles)}, **BUCKETS, **options)


def batches_of(tuner: FineTuner) -> list[dict[str, Any]]:
    """Returns training batches of more than two shapes."""
    config = tuner.config
    images = CaptionedImages(config.data, config.seed, config.batch_size, start_sample=0)
    images.prepare_data()
    loader = iter(images.train_dataloader())
    batches = [next(loader) for _ in range(NUM_BATCHES)]
    assert len({batch["image"].shape for batch in batches}) > 2
    return batches


def test_scales_are_means_over_squares_of_the_rectangle(sdxl: Path, rectangles: Path) -> None:
    """Sum of p times the mean squared error of means over p x p latents; in numpy."""
    tuner = tuner_of(sdxl, rectangles, MULTI_SCALE)
    for batch in batches_of(tuner):
        with torch.no_grad():
            found = tuner.training_step(batch, 0)["loss"]
            output, target = tuner.predict(batch, tuner.draws(batch))
        error = (output - target).double().numpy()
        rows, channels, height, width = error.shape
        total = 0.0
        for p in (1, 2, 4):
            cut = error.reshape(rows, channels, height // p, p, width // p, p)
            total += p * np.square(cut.mean(axis=(3, 5))).mean()
        assert float(found) == pytest.approx(total, rel=1e-5)


def test_the_shift_is_that_of_the_square(sdxl: Path, rectangles: Path) -> None:
    """By 2 log(8 / 16) in log SNR for every bucket of 16^2 px; the last timestep stays noise."""
    tuner, plain = (tuner_of(sdxl, rectangles, options) for options in (SHIFT, {}))
    schedule = tuner.model.process.schedule
    zero = NoiseSchedule.scaled_linear().zero_terminal_snr()
    assert_close(schedule.alpha_bar, zero.shifted(8, 16).alpha_bar, rtol=1e-12, atol=0)
    assert schedule.is_zero_terminal_snr
    shift = (schedule.log_snr - zero.log_snr)[:-1]
    assert_close(shift, torch.full_like(shift, 2 * np.log(0.5)), rtol=0, atol=1e-8)
    [batch, *_] = batches_of(tuner)
    with torch.no_grad():
        losses = [one.training_step(batch, 0)["losses"] for one in (tuner, plain)]
    assert not torch.equal(*losses)


def test_uncertainty_learns_beside_the_unet(sdxl: Path, rectangles: Path) -> None:
    tuner = tuner_of(sdxl, rectangles, UNCERTAINTY)
    assert tuner.uncertainty is not None
    for batch in batches_of(tuner)[:2]:
        tuner.zero_grad()
        tuner.training_step(batch, 0)["loss"].backward()
        unet = tuner.model.unet
        learned = (*tuner.uncertainty.parameters(), unet.add_embedding.linear_1.weight)
        for weight in learned:
            assert weight.grad is not None and weight.grad.abs().max() > 0


@pytest.mark.slow
def test_a_run_has_all_of_them_at_once(
    sdxl: Path, rectangles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exports(monkeypatch)
    values = {**BUCKETS, **MULTI_SCALE, **SHIFT, **UNCERTAINTY, "trainer.max_steps": 3}
    config = tiny_config(tmp_path / "run", sdxl, rectangles, **values)
    assert blackpoint.train.run.fit(config) == 0
    losses = [value for _, value in read_metrics(tmp_path / "run" / "metrics.csv")["train/loss"]]
    assert len(losses) == 3 and np.isfinite(losses).all()
    model = DiffusionModel.load(tmp_path / "run" / "checkpoints" / "step_00000003.ckpt")
    assert model.is_xl and model.process.schedule.is_zero_terminal_snr
