"""Training in pixel space, from random weights: what a run makes, exact resume, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.model_config import DropoutConfig
from blackpoint.train.draws import dropout_seeds
from blackpoint.train.dropout import SampleDropout, SampleSeeds, add_dropout, keep_mask
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.run import fit
from tests.pixel_models import CLASSES, pixel_model, pixel_train_config
from tests.tiny_run import Killed, assert_same_run, kill, load_checkpoint, stop_in_step, tiny_config

DROPOUT = {"dropout.probability": 0.2, "dropout.max_resolution": 4}


@pytest.mark.parametrize("condition", ["none", "text"])
@pytest.mark.slow
def test_a_run_ends_with_an_export_that_is_its_average(
    condition: str, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = pixel_train_config(
        tmp_path / "run", shards, condition, pipeline, **{"loss.pool_factors": [1, 2, 4]}
    )
    assert fit(config) == 0
    model = DiffusionModel.load(tmp_path / "run")
    average = {f"unet.{name}": value for name, value in model.unet.state_dict().items()}
    stored = load_checkpoint(tmp_path / "run", 6)["state_dict"]
    assert_close(average, dict(stored), rtol=0, atol=0)
    assert (model.tokenizer is None) == (condition == "none")
    names = set(read_metrics(tmp_path / "run" / "metrics.csv"))
    assert {"train/loss_pool_2", "train/loss_pool_4"} <= names


@pytest.mark.slow
def test_captions_are_class_names_in_a_class_conditional_run(
    tmp_path: Path, class_shards: Path
) -> None:
    assert fit(pixel_train_config(tmp_path / "run", class_shards, "class")) == 0
    images = DiffusionModel.load(tmp_path / "run").sample(CLASSES, seeds=[0, 1, 2], num_steps=2)
    assert images.shape == (3, 3, 16, 16)


@pytest.mark.slow
def test_a_killed_run_with_dropout_equals_an_unbroken_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {"data.validation_shards": str(shards), "data.validation_images": 5}
    overrides = DROPOUT | validation
    fit(pixel_train_config(tmp_path / "whole", shards, "none", **overrides))
    broken = pixel_train_config(tmp_path / "broken", shards, "none", **overrides)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_in_step(patch, 4, kill)
        fit(broken)
    fit(broken)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_checkpoint_of_a_run_directory_that_was_moved_still_loads(
    shards: Path, tmp_path: Path
) -> None:
    fit(pixel_train_config(tmp_path / "run", shards, "none"))
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    newest = tmp_path / "elsewhere" / "checkpoints" / "step_00000006.ckpt"
    model = DiffusionModel.load(newest, weights="raw")
    assert model.pixels is not None and model.image_size == 16
    export(newest, tmp_path / "out")


def test_the_loss_is_measured_on_pixels_whatever_the_codec(shards: Path, tmp_path: Path) -> None:
    """A new network answers 0, so its loss is that of v itself, and v lives in pixels."""
    batch = {
        "image": torch.full((2, 3, 16, 16), 64, dtype=torch.uint8),
        "caption": ["", ""],
        "epoch": torch.zeros(2, dtype=torch.long),
        "index": torch.arange(2),
    }
    found = []
    for codec in ("space_to_depth", "wavelet"):
        config = pixel_train_config(tmp_path / codec, shards, "none", **{"model.codec": codec})
        tuner = FineTuner(pixel_model("none", codec=codec), config)
        draws = tuner.draws(batch)
        assert draws.posterior_noise is None, "pixels are x0: no noise is drawn for a posterior"
        assert draws.eps.shape == (2, 3, 16, 16)
        found.append(tuner.losses(batch, draws))
    assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_masks_are_functions_of_the_sample_and_drop_the_share_that_is_asked_for() -> None:
    seeds = torch.tensor([5, -7, 2**62])
    mask = keep_mask(seeds, (64, 16, 16), 0.3)
    assert_close(keep_mask(seeds[1:2], (64, 16, 16), 0.3)[0], mask[1])
    n = mask[0].numel()
    for row in mask:  # within 4 standard errors of the share
        assert abs(row.double().mean().item() - 0.7) < 4 * (0.3 * 0.7 / n) ** 0.5
    agree = (mask[0] == mask[1]).double().mean().item()
    assert abs(agree - (0.7**2 + 0.3**2)) < 4 * 0.5 / n**0.5
    shifted = (mask[0].flatten()[1:] == mask[0].flatten()[:-1]).double().mean().item()
    assert abs(shifted - (0.7**2 + 0.3**2)) < 4 * 0.5 / n**0.5


def test_dropout_is_at_the_chosen_levels_alone_and_only_in_training() -> None:
    unet = pixel_model("none").unet
    names = set(unet.state_dict())
    seeds = SampleSeeds()
    add_dropout(unet, DropoutConfig(0.2, 4), 8, seeds)
    assert set(unet.state_dict()) == names
    found = [n for n, m in unet.named_modules() if isinstance(m, SampleDropout)]
    levels = {name.rsplit(".resnets")[0].rsplit(".attentions")[0] for name in found}
    assert levels == {"down_blocks.1", "mid_block", "up_blocks.0"}
    for weight in unet.parameters():
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    x, token = torch.randn(2, 12, 8, 8), torch.zeros(2, 1, 1)
    t = torch.tensor([10, 500])
    expected = unet(x, t, token).sample
    unet.train()
    seeds.of_batch = dropout_seeds(0, [0, 0], [0, 1])
    dropped = unet(x, t, token).sample
    assert not torch.allclose(dropped, expected)
    assert_close(unet(x, t, token).sample, dropped, rtol=0, atol=0)
    seeds.of_batch = dropout_seeds(0, [0], [1])
    assert_close(unet(x[1:], t[1:], token[1:]).sample, dropped[1:], rtol=0, atol=1e-4)
    assert_close(unet.eval()(x, t, token).sample, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"dropout.probability": 0.1, "dropout.max_resolution": 5},
            "no level of this UNet has feature maps of that side; theirs are 8, 4",
        ),
        ({"data.resolution": 18}, "data.resolution=18: must be a multiple of 4 px"),
        ({"loss.pool_factors": [1, 3]}, "3 does not divide"),
        ({"preview.every_steps": 2, "preview.prompts": ["a dog"]}, "unconditional"),
        ({"schedule.log_snr_max": 25}, "can.t be exported"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    overrides: dict[str, Any], expected: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        fit(pixel_train_config(tmp_path / "run", shards, "none", **overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.channels": []}, "checkpoint is not set: name what to start from"),
        ({"checkpoint": "sd"}, "starts from a checkpoint or makes its own model"),
        (
            {"schedule.betas": "checkpoint", "schedule.log_snr_min": None}
            | {"schedule.log_snr_max": None},
            "schedule.betas=checkpoint, but the run starts from random weights",
        ),
        ({"schedule.log_snr_min": None}, "cosine_continuous needs schedule.log_snr_min"),
        ({"dropout.probability": 1.0}, "dropout.probability"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(
    overrides: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        pixel_train_config(tmp_path / "run", tmp_path, "none", **overrides)


def test_a_caption_that_is_no_class_is_refused(shards: Path, tmp_path: Path) -> None:
    config = pixel_train_config(tmp_path / "run", shards, "class")
    with pytest.raises(UserError, match="is not one of the 3 classes"):
        fit(config)


def test_cached_latents_are_refused_for_a_pixel_model(tmp_path: Path, pipeline: Path) -> None:
    from blackpoint.train.encode.config import EncodeConfig
    from blackpoint.train.encode.encode import encode

    pixel_model("none").save(tmp_path / "model")
    from tests.tiny_run import make_tiny_shards

    shards = make_tiny_shards(tmp_path / "images")
    with pytest.raises(UserError, match="pixel-space model, which has no autoencoder"):
        encode(
            EncodeConfig(
                source=str(shards),
                checkpoint=str(tmp_path / "model"),
                output=str(tmp_path / "latents"),
                resolution=16,
            )
        )
    encode(
        EncodeConfig(
            source=str(shards),
            checkpoint=str(pipeline),
            output=str(tmp_path / "latents"),
            resolution=16,
        )
    )
    with pytest.raises(UserError, match="a pixel-space model is trained on images"):
        fit(pixel_train_config(tmp_path / "run", tmp_path / "latents", "none"))


def test_a_fine_tune_of_a_stable_diffusion_can_drop_out_too(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **DROPOUT)
    tuner = FineTuner(DiffusionModel.load(pipeline), config)
    assert tuner.dropout_seeds is not None


@pytest.fixture(scope="module")
def class_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose captions are the three classes."""
    import numpy as np
    from PIL import Image

    from blackpoint.data.pack.pack import PackConfig, pack

    folder = tmp_path_factory.mktemp("classes")
    (folder / "source").mkdir()
    for number in range(12):
        pixels = np.full((16, 16, 3), (0, 255, 128)[number % 3], np.uint8)
        Image.fromarray(pixels).save(folder / "source" / f"{number:03d}.png")
        (folder / "source" / f"{number:03d}.txt").write_text(CLASSES[number % 3])
    pack(PackConfig(source=str(folder / "source"), output=str(folder / "shards")))
    return folder / "shards"
