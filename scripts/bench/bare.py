"""The bare training loop that the benchmark measures against: what any trainer must do, no more.

Encode (or take the cached moments), draw t and eps, add noise, predict, step back, clip, fused
AdamW; on batches that lie decoded in memory. It reads nothing, averages no weights, checks no loss
and logs nothing.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.prediction import add_noise, training_target
from blackpoint.sampling.process import Process
from blackpoint.scripts.bench.inputs import held_images, held_moments
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import settled_rate
from blackpoint.train.target_process import fine_tuned_process

HELD_BATCHES = 8
Steps = Callable[[int], None]  # takes so many optimizer steps


def bare_loop(config: TrainConfig, folder: Path, cached: bool) -> Steps:
    """Returns a function that takes optimizer steps with its own copy of the model.

    `folder` holds the unpacked images, or with `cached` the unpacked moments and embeddings.
    """
    model = DiffusionModel.load(str(config.checkpoint))
    process = fine_tuned_process(config, model.process)
    unet = model.unet.requires_grad_(True).train()
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, settled_rate(config.optimizer), fused=True)
    update = bare_update(unet, parameters, process, optimizer, config.trainer.gradient_clip)
    batches: Iterator[dict[str, Any]] = itertools.cycle(
        held_moments(folder, config.batch_size, HELD_BATCHES)
        if cached
        else held_images(folder, config.data.resolution, config.batch_size, HELD_BATCHES)
    )
    encode = _from_moments if cached else _from_images

    def steps(count: int) -> None:
        for batch in itertools.islice(batches, count):
            x0, embeds = encode(model, batch)
            update(x0, embeds)

    return steps


def bare_update(
    unet: Any,
    parameters: Sequence[Tensor],
    process: Process,
    optimizer: Optimizer,
    clip: float,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    scaler: Any = None,
    dtype: torch.dtype | None = None,
) -> Callable[..., None]:
    """Returns the function (x0, prompt_embeds, **others) that takes one optimizer step on the
    device of x0, which nothing is read from; `others` are arguments of the UNet.

    `autocast` makes the context of its forward pass, `scaler` scales the loss of float16; `dtype`
    is that of weights which are not in float32.
    """
    schedule, kind = process.schedule, process.prediction_type
    tables: list[Tensor] = []

    def update(x0: Tensor, embeds: Tensor, **others: Any) -> None:
        if not tables:
            tables.extend(c.float().to(x0.device) for c in (schedule.alpha, schedule.sigma))
        t = torch.randint(schedule.num_steps, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in tables)
        with autocast():
            x_t = add_noise(x0, eps, alpha, sigma)
            output = unet(x_t.to(dtype or x_t.dtype), t, embeds, **others).sample
        loss = F.mse_loss(output.float(), training_target(kind, x0, eps, alpha, sigma))
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    return update


def _from_images(model: DiffusionModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    images = batch["image"].float() / 255
    shape = (len(images), *model.latent_shape(*images.shape[-2:]))
    x0 = model.encode(images, torch.randn(shape))
    return x0, model.encode_prompts(batch["caption"]).prompt_embeds


def _from_moments(model: DiffusionModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, log_variance = batch["moments"].chunk(2, dim=1)
    x0 = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape)
    return x0 * model.vae.config.scaling_factor, batch["prompt_embeds"]
