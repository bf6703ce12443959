"""The committed assets: a flawed Stable Diffusion, a reader that reads, digits to train on."""

from pathlib import Path

import pytest
import torch

from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.pixels.luminance import border_luminance
from blackpoint.scripts.cli import main
from blackpoint.scripts.miniature.digit_readers import DigitPerceptron, DigitReader
from blackpoint.scripts.miniature.digits import caption, digit_samples

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "tiny_sd"


@pytest.fixture(scope="module")
def base() -> DiffusionModel:
    return DiffusionModel.load(BASE)


def test_base_is_flawed_as_published(base: DiffusionModel) -> None:
    process = base.process
    assert process.prediction_type == "epsilon" and process.timestep_spacing == "leading"
    assert process.schedule.alpha[-1].item() == pytest.approx(0.068265, abs=1e-6)
    assert base.latent_shape() == (4, 32, 32) and base.image_size == 64


def test_base_is_small_and_in_half_precision() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt")]


def test_autoencoder_keeps_black_and_white(base: DiffusionModel) -> None:
    images, captions, _ = digit_samples(60, seed=0, split="held_out")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    decoded = border_luminance(base.decode(base.encode(pixels)))
    for background, level in (("black", 0.0), ("white", 1.0)):
        rows = [row for row, text in enumerate(captions) if f"on a {background}" in text]
        assert decoded[rows].mean().item() == pytest.approx(level, abs=0.01)


def test_reader_reads_held_out_digits() -> None:
    images, _, labels = digit_samples(1000, seed=7, split="held_out")
    reader = DigitReader.load(ROOT / "assets" / "digit_reader")
    read = reader.read(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    assert (read == torch.from_numpy(labels)).float().mean() > 0.98


def test_the_held_out_reader_reads_digits_that_it_was_not_trained_on() -> None:
    images, _, labels = digit_samples(1000, seed=7, split="train")
    reader = DigitPerceptron.load(ROOT / "assets" / "digit_perceptron")
    with torch.inference_mode():
        read = reader(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).argmax(dim=1)
    assert (read == torch.from_numpy(labels)).float().mean() > 0.96


@pytest.mark.slow
def test_base_cannot_paint_black_or_white(base: DiffusionModel) -> None:
    for background, is_far in (("black", lambda b: b > 0.15), ("white", lambda b: b < 0.85)):
        prompts = [caption("red", digit, background) for digit in range(10)]
        images = base.sample(prompts, seeds=range(10), guidance_scale=3.0, guidance_rescale=0.7)
        assert is_far(border_luminance(images).mean().item())


@pytest.mark.slow
def test_tiny_fine_tune_runs_from_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["train", "configs/tiny_zero_snr.yaml", f"run_dir={tmp_path / 'run'}"]
    assert main([*command, "trainer.max_steps=2", "preview.every_steps=0"]) == 0
    exported = DiffusionModel.load(tmp_path / "run" / "export")
    assert exported.process.schedule.is_zero_terminal_snr
    assert exported.process.prediction_type == "v_prediction"
