"""An SDXL whose autoencoder claims to bear float16 and overflows: said once, nothing is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from blackpoint.train.run import fit
from tests.test_train_lora import without_exports
from tests.tiny_pipeline import make_autoencoder_overflow
from tests.tiny_run import tiny_config
from tests.tiny_sdxl import make_tiny_sdxl

NOTE = "overflows in float16"
HALF = ["num_steps=2", "device=cpu", "dtype=float16"]
PROMPTS = 'prompts=["a red one", "a blue two"]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl", vae={"force_upcast": False})
    return make_autoencoder_overflow(place)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_sample_generates_the_pictures_of_a_float32_autoencoder(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = [f"checkpoint={folder}", PROMPTS, f"output={tmp_path / 'out'}", "batch_size=1"]
    assert main(["sample", *given, *HALF]) == 0
    assert caplog.text.count(NOTE) == 1
    model = DiffusionModel.load(folder, dtype=torch.float16)
    model._encoders._cast("vae", torch.float32)
    expected = model.sample("a red one", [0], num_steps=2)[0].permute(1, 2, 0)
    found = pixels(tmp_path / "out" / "images" / "0_0.png")
    assert np.abs(found / 255 - expected.numpy()).max() <= 0.6 / 255
    assert found.std() > 1  # neither black nor one value


@pytest.mark.slow
def test_evaluate_measures_finite_pictures(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = [f"checkpoint={folder}", PROMPTS, f"output={tmp_path / 'out'}"]
    assert main(["evaluate", *given, *HALF]) == 0
    assert caplog.text.count(NOTE) == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "NaN" not in json.dumps(metrics)


@pytest.mark.slow
def test_training_encodes_and_previews_in_float32_from_then_on(
    folder: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    without_exports(monkeypatch)
    values = {"trainer.encoder_dtype": "float16", "trainer.max_steps": 2, "preview.num_images": 1}
    values |= {"preview.every_steps": 1, "preview.num_steps": 1}
    assert fit(tiny_config(tmp_path / "run", folder, shards, **values)) == 0
    assert caplog.text.count(NOTE) == 1
    previews = list((tmp_path / "run" / "previews").glob("*.png"))
    assert previews and all(pixels(path).std() > 1 for path in previews)
