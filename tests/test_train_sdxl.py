"""Training of SDXL: a step as diffusers' parts compute it, at every weight, in whole runs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from omegaconf import OmegaConf
from torch import Tensor
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.train.draws import Draws
from blackpoint.train.dropout import SampleSeeds, add_dropout
from blackpoint.train.loss_weights import WEIGHTS
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.test_data_buckets import write_images
from tests.test_train_lora import without_exports
from tests.test_train_processes import ROOT
from tests.tiny_run import (
    Killed,
    assert_same_run,
    kill,
    load_checkpoint,
    stop_in_step,
    tiny_config,
    tiny_tuner,
)
from tests.tiny_sdxl import make_tiny_sdxl
from tests.waiting import PATIENCE_S

BUCKETS: dict[str, Any] = {"data.buckets.enabled": True, "data.buckets.step_px": 8}
LORA: dict[str, Any] = {"lora.rank": 4, "lora.dropout": 0.2}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: epsilon, non-zero terminal SNR."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("rectangles"), 20)


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> None:
    without_exports(monkeypatch)


def batch_of(tuner: FineTuner) -> dict[str, Any]:
    config = tuner.config
    images = CaptionedImages(config.data, config.seed, config.batch_size, start_sample=0)
    images.prepare_data()
    batch: dict[str, Any] = next(iter(images.train_dataloader()))
    return batch


def tuner_of(sdxl: Path, shards: Path, **overrides: Any) -> FineTuner:
    return tiny_tuner(sdxl, **{"data.shards": str(shards), **overrides})


def at_the_last_timestep(tuner: FineTuner, batch: dict[str, Any]) -> Draws:
    draws = tuner.draws(batch)
    return Draws(draws.posterior_noise, torch.full_like(draws.t, 999), draws.eps)


@pytest.mark.parametrize("options", [{"data.flip": True}, BUCKETS], ids=["flipped", "bucketed"])
def test_a_step_is_that_of_the_parts_of_diffusers(
    options: dict[str, Any], sdxl: Path, rectangles: Path
) -> None:
    """Texts by the stock pipeline, sizes as rows of six integers, v by the stock scheduler.

    Float32 throughout: 1e-5 is about 100 roundings of numbers of size 1.
    """
    options = {**options, "data.caption_dropout": 0.4, "batch_size": 6}
    tuner = tuner_of(sdxl, rectangles, **options)
    batch = batch_of(tuner)
    assert {"", "a red one"} == set(batch["caption"])
    draws = tuner.draws(batch)
    losses = tuner.losses(batch, draws)

    stock = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    scheduler = DDPMScheduler.from_config(
        stock.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt(
            batch["caption"], device="cpu", do_classifier_free_guidance=False
        )
        posterior = stock.vae.encode(batch["image"].float() / 127.5 - 1).latent_dist
        assert draws.posterior_noise is not None
        x0 = (posterior.mean + posterior.std * draws.posterior_noise) * 0.13025
        x_t = scheduler.add_noise(x0, draws.eps, draws.t)
        target = scheduler.get_velocity(x0, draws.eps, draws.t)
        sizes = torch.tensor([[int(number) for number in row] for row in batch["sizes"]])
        added = {"text_embeds": pooled, "time_ids": sizes}
        output = stock.unet(x_t, draws.t, embeds, added_cond_kwargs=added).sample
    expected = (output - target).square().flatten(1).mean(dim=1)
    assert_close(losses.detach(), expected, rtol=1e-5, atol=1e-5)
    batch["sizes"] = batch["sizes"] + 1
    assert (tuner.losses(batch, draws).detach() - expected).abs().max() > 1e-4


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_the_last_timestep_has_a_gradient_by_every_weight(
    weighting: str, sdxl: Path, rectangles: Path
) -> None:
    """Published min-SNR is 0 there for v; all of the UNet learns, sizes and texts included."""
    tuner = tuner_of(sdxl, rectangles, **{"loss.weighting": weighting, "data.caption_dropout": 0.0})
    assert tuner.model.process.schedule.is_zero_terminal_snr
    batch = batch_of(tuner)
    draws = at_the_last_timestep(tuner, batch)
    tuner.objective(tuner.losses(batch, draws), draws.t).mean().backward()
    unet = tuner.model.unet
    for layer in (unet.conv_out, unet.add_embedding.linear_1, unet.conv_in):
        assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


def test_captions_are_encoded_once_with_their_pooled_embedding(
    sdxl: Path, rectangles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = tuner_of(sdxl, rectangles)
    captions = ["a red one", "", "a blue two", ""]
    expected = [tuner.model.encode_prompts([caption]) for caption in captions]
    for _ in range(2):
        found = tuner.embed(captions)
        assert_close(found.prompt_embeds, torch.cat([e.prompt_embeds for e in expected]))
        assert found.pooled is not None
        assert_close(found.pooled, torch.cat([e.pooled for e in expected if e.pooled is not None]))
        monkeypatch.setattr(DiffusionModel, "encode_prompts", None)


def test_dropout_reaches_rectangles_at_the_levels_of_the_square(
    sdxl: Path, rectangles: Path
) -> None:
    """Latents of 16 px squares are 8 wide; those of buckets 4 x 16 and of every shape between."""
    values = {**BUCKETS, "dropout.probability": 0.5, "dropout.max_resolution": 4}
    plain, dropped = tuner_of(sdxl, rectangles, **BUCKETS), tuner_of(sdxl, rectangles, **values)
    square = DiffusionModel.load(sdxl).unet
    add_dropout(square, dropped.config.dropout, 8, SampleSeeds())
    names = [name for name, _ in square.named_modules()]
    assert [name for name, _ in dropped.model.unet.named_modules()] == names
    config = plain.config
    images = CaptionedImages(config.data, config.seed, config.batch_size, start_sample=0)
    images.prepare_data()
    loader, shapes = iter(images.train_dataloader()), set()
    for batch in (next(loader) for _ in range(8)):
        shapes.add(batch["image"].shape[2:])
        losses = [tuner.training_step(batch, 0)["losses"] for tuner in (plain, dropped)]
        assert torch.isfinite(losses[1]).all() and not torch.equal(*losses)
    assert len(shapes) > 2


KINDS: dict[str, dict[str, Any]] = {"full": {}, "LoRA": LORA}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(
    kind: str, sdxl: Path, rectangles: Path, tmp_path: Path
) -> None:
    """By its config alone to v at zero SNR, with buckets, flips, validation and previews."""
    values = {**KINDS[kind], **BUCKETS, "data.flip": True, "trainer.max_steps": 4}
    values |= {"data.validation_shards": str(rectangles), "preview.every_steps": 4}
    values |= {"preview.num_steps": 1, "preview.num_images": 1, "trainer.checkpoint_every_steps": 2}
    values |= {"trainer.validate_every_steps": 2, "data.validation_images": 8}
    unbroken = tiny_config(tmp_path / "unbroken", sdxl, rectangles, **values)
    assert blackpoint.train.run.fit(unbroken) == 0
    config = tiny_config(tmp_path / "run", sdxl, rectangles, **values)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 3, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken", step=4)
    process = Process.from_diffusers(load_checkpoint(tmp_path / "run", 4)["blackpoint"]["process"])
    assert process.schedule.is_zero_terminal_snr and process.prediction_type == "v_prediction"
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(np.isfinite(v) for name in metrics for _, v in metrics[name])
    assert {"validation/loss", "preview/luminance_error"} <= metrics.keys()
    model = DiffusionModel.load(tmp_path / "run" / "checkpoints" / "step_00000004.ckpt")
    assert model.is_xl and changed(model, DiffusionModel.load(sdxl))


def changed(one: DiffusionModel, other: DiffusionModel) -> bool:
    def weight(model: DiffusionModel) -> Tensor:
        block = model.unet.down_blocks[1].attentions[0].transformer_blocks[0]
        found: Tensor = block.attn2.to_k.weight
        return found

    return not torch.equal(weight(one), weight(other))


WITHOUT_EXPORTS = """
import sys
import pytest
from blackpoint.scripts.cli import main
from tests.test_train_lora import without_exports

without_exports(pytest.MonkeyPatch())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one(
    kind: str, sdxl: Path, rectangles: Path, tmp_path: Path
) -> None:
    """In two processes gradients are summed in another order: rounding, which Adam divides by."""
    values = {**KINDS[kind], **BUCKETS, "trainer.max_steps": 4}
    script, yaml = tmp_path / "train.py", tmp_path / "run2.yaml"
    script.write_text(WITHOUT_EXPORTS)
    config = tiny_config(tmp_path / "run2", sdxl, rectangles, **values, **{"trainer.devices": 2})
    OmegaConf.save(OmegaConf.structured(config), yaml)
    together = subprocess.Popen(
        [sys.executable, str(script), "train", str(yaml)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    one = tiny_config(tmp_path / "run1", sdxl, rectangles, **values)
    assert blackpoint.train.run.fit(one) == 0
    assert together.wait(PATIENCE_S) == 0
    metrics = [read_metrics(tmp_path / name / "metrics.csv") for name in ("run1", "run2")]
    for name in ("train/loss", "train/gradient_norm"):
        (ours, theirs) = ([value for _, value in each[name]] for each in metrics)
        assert len(ours) == 4
        assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
