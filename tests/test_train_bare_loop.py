"""`blackpoint train` is the training of Lin et al. 2023: a loop of its own makes the same weights.

The loop is plain torch over the classes of diffusers and transformers. Of the product it takes what
is a contract, not mathematics: which samples come in which order with which captions (`data`), and
the draws of t, eps and the posterior's noise (`blackpoint.train.draws`).
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from omegaconf import OmegaConf
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import blackpoint.train.run
from blackpoint.data.module import CaptionedImages
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.draws import draw
from tests.tiny_run import load_checkpoint, tiny_config

pytestmark = pytest.mark.slow

# Both loops compute the same float32 numbers in other orders: fused or not, one caption or a
# batch, four rows or two and two. The elements of a gradient, clipped to the norm 1, are 3e-3 in
# the root mean square; each is a sum whose terms cancel in part, so that its error is that of the
# terms: 6e-8 of some 1e-1, about 1e-8, however small the element. Adam's first step, lr g / (|g| +
# epsilon), has the slope lr / epsilon where |g| < epsilon. With the usual epsilon of 1e-8 the few
# elements there move by lr in either sense, and the order of summation alone costs 1.5e-5 of the
# update; with 1e-5, which also shows more, they move by 1e-3 lr. Weights are rounded to 6e-8 of
# themselves at each step, and steps that differ by d round to different numbers in a share d /
# (6e-8 w) of the weights, which is sqrt(6e-8 w d) in the mean square: with w = .1 and d = 1e-9,
# 2.4e-9, or 2.4e-6 of a step of 1e-3. Together a few 1e-6. What is wrong in earnest (a bias
# correction, the scale of the latents, a loss that is averaged otherwise) shows from 1e-4 on.
TOLERANCE = 1e-5
EPSILON = 1e-5
SETTINGS: dict[str, Any] = {
    "trainer.max_steps": 5,
    "trainer.validate_every_steps": 0,
    "optimizer.epsilon": EPSILON,
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"trainer.accumulate_grad_batches": 2},
    "two processes": {"trainer.devices": 2},
}


def zero_snr_alpha_bar() -> Tensor:
    """Stable Diffusion's betas, rescaled by Algorithm 1; alpha_bar (1000,) float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


def batches_of(config: TrainConfig) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields the global batches with their draws."""
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    images.setup("fit")
    [reader] = images.readers().values()
    start = 0
    while True:
        batch = reader.batch(range(start, start + config.batch_size))
        start += config.batch_size
        epochs, indices = batch["epoch"].tolist(), batch["index"].tolist()
        yield batch, draw(config.seed, epochs, indices, (4, 8, 8), 1000)


def bare_loop(config: TrainConfig, pipeline: Path) -> dict[str, dict[str, Tensor]]:
    """Trains; returns the weights of the start ("base"), of the end ("raw"), and their average."""
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet").train()
    vae = AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    text_encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    alpha_bar = zero_snr_alpha_bar()
    base = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    average: dict[str, Tensor] = {}
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, (0.9, 0.999), EPSILON)
    batches, num_micro_steps = batches_of(config), config.trainer.accumulate_grad_batches
    for step in range(config.trainer.max_steps):
        for _ in range(num_micro_steps):
            batch, draws = next(batches)
            tokens = tokenizer(
                batch["caption"],
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            with torch.no_grad():
                text = text_encoder(tokens)[0]
                posterior = vae.encode(batch["image"].float() / 127.5 - 1).latent_dist
                x0 = (posterior.mean + posterior.std * draws.posterior_noise) * 0.18215
            alpha = alpha_bar[draws.t].sqrt().float().view(-1, 1, 1, 1)
            sigma = (1 - alpha_bar[draws.t]).sqrt().float().view(-1, 1, 1, 1)
            v = alpha * draws.eps - sigma * x0
            predicted = unet(alpha * x0 + sigma * draws.eps, draws.t, text).sample
            ((predicted - v).square().mean() / num_micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 3)  # 2 steps of warm-up
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for name, weight in unet.named_parameters():
            before = average.get(name, weight)
            average[name] = (decay * before + (1 - decay) * weight).detach().clone()
    raw = {name: weight.detach() for name, weight in unet.named_parameters()}
    return {"base": base, "raw": raw, "average": average}


def flat(weights: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in names])


@pytest.mark.parametrize("mode", MODES)
def test_training_makes_the_weights_and_the_average_of_a_bare_loop(
    mode: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **SETTINGS | MODES[mode])
    assert (config.batch_size, config.ema.decay, config.optimizer.warmup_steps) == (4, 0.9, 2)
    if config.trainer.devices == 1:
        monkeypatch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        assert blackpoint.train.run.fit(config) == 0
    else:
        yaml = tmp_path / "run.yaml"
        yaml.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        command = [sys.executable, "-m", "blackpoint.scripts.cli", "train", str(yaml)]
        assert subprocess.run(command, timeout=300).returncode == 0
    saved = load_checkpoint(tmp_path / "run", config.trainer.max_steps)
    expected = bare_loop(config, pipeline)
    names = list(expected["base"])
    base = flat(expected["base"], names)
    for kind, key in (("raw", "current_model_state"), ("average", "state_dict")):
        weights = {name.removeprefix("unet."): value for name, value in saved[key].items()}
        assert set(names) == set(weights)
        update = flat(expected[kind], names) - base
        error = flat(weights, names) - flat(expected[kind], names)
        assert update.norm() / base.norm() > 1e-3, "nothing was learned"
        assert error.norm() / update.norm() < TOLERANCE, kind
