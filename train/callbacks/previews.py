"""Preview grids: the training model's images at fixed prompts and seeds, as it learns.

Before the first step they are the base's own, by the process that it came with (such as epsilon on
a schedule with non-zero terminal SNR): what the run is to change.

Their luminance is logged beside them, so that a run shows its black point moving: of each prompt
preview/luminance_<prompt> (whole image) and preview/border_luminance_<prompt>, and as one number
preview/luminance_error, the mean distance to what the prompts ask for, where they do. wandb gets a
row for each image beside (preview_table), and in its summary black_point/black, /white and /error:
the latest mean luminance where black and where white is asked for, and the mean distance.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from blackpoint.sampling.pixels.luminance import border_luminance, image_luminance
from blackpoint.sampling.prompts.brightness_target import luminance_target, prompt_slugs
from blackpoint.sampling.runtime.picture_grid import caption_grid
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.callbacks.watch import EverySteps, Watch
from blackpoint.train.cluster.sharding import takes_part
from blackpoint.train.config.config import PreviewConfig
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner

CAPTION_LENGTH, TABLE_PX = 100, 256


class Previews(EverySteps):
    """Writes previews/step_00000500.png, with the averaged weights if there are any; step 0 is the
    base."""

    def __init__(self, folder: Path, config: PreviewConfig, watch: Watch, ema: Ema | None) -> None:
        super().__init__(config.every_steps, watch)
        self.folder, self.config, self.ema = folder, config, ema

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FineTuner)
        if trainer.global_step == 0 and pl_module.model.base_process is not None:
            with self.watch.paused():
                self.at_step(trainer, pl_module, 0)

    def at_step(self, trainer: Trainer, module: FineTuner, step: int) -> None:
        if not takes_part(trainer):
            return
        images = self._sample(trainer, module, step)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.png"
        metrics, captions, measured = measure(images, self.config.prompts)
        base = module.model.base_process
        name = f"step {step}" if step or not base else f"base ({base.prediction_type})"
        preview_grid(images, captions, name).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("previews", [str(path)], step=step, caption=["; ".join(captions)])
                send_rows(logger, step, images, measured)
        log_metrics(trainer, metrics)  # last: what metrics.csv holds has been shown

    def _sample(self, trainer: Trainer, module: FineTuner, step: int) -> Tensor:
        prompts, columns = self.config.prompts, range(self.config.num_images)
        swap = self.ema.swapped_in(module) if self.ema and step else contextlib.nullcontext()
        process = module.model.process
        module.model.process = process if step else module.model.base_process or process
        forward, encoders = trainer.precision_plugin.forward_context(), module.encoders_at_hand()
        with torch.no_grad(), swap, forward, encoders:
            module.model.unet.eval()
            images = module.model.sample(
                [prompt for prompt in prompts for _ in columns],
                seeds=[seed for _ in prompts for seed in columns],
                num_steps=self.config.num_steps,
                guidance_scale=self.config.guidance_scale,
                guidance_rescale=self.config.guidance_rescale,
                height=module.config.data.resolution,
                width=module.config.data.resolution,
                allow_unsound=module.config.allow_unsound,
                max_tokens=module.config.data.max_tokens,
            )
            module.model.unet.train()
        module.model.process = process
        return images


def preview_grid(images: Tensor, captions: Sequence[str], title: str) -> Image.Image:
    """Lays out images (N, 3, H, W) in [0, 1], seeds 0, 1, ... of each caption in turn, in rows."""
    pictures = [to_picture(image) for image in images]
    columns = len(pictures) // len(captions)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return caption_grid(captions, rows, [f"{title}, seed {seed}" for seed in range(columns)])


@dataclass(frozen=True)
class Measured:
    """One image of a preview."""

    prompt: str
    seed: int
    luminance: float
    """Where the prompt asks for one; of the whole image, where it asks for none."""
    target: float | None

    @property
    def error(self) -> float | None:
        return None if self.target is None else abs(self.luminance - self.target)


def measure(
    images: Tensor, prompts: Sequence[str]
) -> tuple[dict[str, float], list[str], list[Measured]]:
    """Returns the metrics of images (N, 3, H, W) in [0, 1], as many for each prompt in turn, the
    prompts with their luminance as captions, and each image by itself."""
    by_prompt = images.float().cpu().unflatten(0, (len(prompts), -1))
    metrics: dict[str, float] = {}
    captions, measured = [], list[Measured]()
    for prompt, slug, rows in zip(prompts, prompt_slugs(prompts), by_prompt, strict=True):
        luminance = {"image": image_luminance(rows), "border": border_luminance(rows)}
        metrics[f"preview/luminance_{slug}"] = luminance["image"].mean().item()
        metrics[f"preview/border_luminance_{slug}"] = luminance["border"].mean().item()
        target = luminance_target(prompt)
        where, wanted = (target.where, target.value) if target else ("image", None)
        for seed, value in enumerate(luminance[where].tolist()):
            measured.append(Measured(prompt, seed, value, wanted))
        caption = f"{shorten(prompt, CAPTION_LENGTH)}: {where} luminance "
        caption += f"{luminance[where].mean():.3f}"
        captions.append(caption + (f", wanted {wanted:g}" if target else ""))
    if errors := [one.error for one in measured if one.error is not None]:
        metrics["preview/luminance_error"] = fmean(errors)
    return metrics, captions, measured


def black_point(measured: Sequence[Measured]) -> dict[str, float]:
    """Returns the mean luminance where black and white are asked for, and the mean error."""
    numbers = {
        "black": [one.luminance for one in measured if one.target == 0],
        "white": [one.luminance for one in measured if one.target == 1],
        "error": [one.error for one in measured if one.error is not None],
    }
    return {f"black_point/{name}": fmean(values) for name, values in numbers.items() if values}


def send_rows(logger: WandbLogger, step: int, images: Tensor, measured: Sequence[Measured]) -> None:
    """Sends a row for each image, its picture reduced, and the black point into the summary."""
    import wandb

    columns: list[str | int] = ["step", "prompt", "seed", "image", "luminance", "target", "error"]
    table = wandb.Table(columns=columns, allow_mixed_types=True)
    for image, one in zip(images, measured, strict=True):
        small = to_picture(image)
        small.thumbnail((TABLE_PX, TABLE_PX))  # the grid has them in full
        numbers = (one.luminance, one.target, one.error)
        table.add_data(step, one.prompt, one.seed, wandb.Image(small), *numbers)
    rows: dict[str, Any] = {"preview_table": table}
    logger.log_metrics(rows, step)
    logger.experiment.summary.update(black_point(measured))
