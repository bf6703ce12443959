"""Preview grids: the training model's images at fixed prompts and seeds, as it learns.

Their luminance is logged beside them, so that a run shows its black point moving: of each prompt
preview/luminance_<prompt> (whole image) and preview/border_luminance_<prompt>, and as one number
preview/luminance_error, the mean distance to what the prompts ask for, where they do.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from blackpoint.sampling.pixels.luminance import border_luminance, image_luminance
from blackpoint.sampling.prompts.brightness_target import luminance_target, prompt_slugs
from blackpoint.sampling.runtime.pictures import caption_grid, to_picture
from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.callbacks.watch import EverySteps, Watch
from blackpoint.train.config.config import PreviewConfig
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner

CAPTION_LENGTH = 100


class Previews(EverySteps):
    """Writes previews/step_00000500.png, with the averaged weights if there are any."""

    def __init__(self, folder: Path, config: PreviewConfig, watch: Watch, ema: Ema | None) -> None:
        super().__init__(config.every_steps, watch)
        self.folder, self.config, self.ema = folder, config, ema

    def at_step(self, trainer: Trainer, module: FineTuner, step: int) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.png"
        images = self._sample(trainer, module)
        pictures = [to_picture(image) for image in images]
        metrics, captions = measure(images, self.config.prompts)
        columns = self.config.num_images
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
        titles = [f"step {step}, seed {seed}" for seed in range(columns)]
        caption_grid(captions, rows, titles).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("previews", [str(path)], step=step, caption=["; ".join(captions)])
        log_metrics(trainer, metrics)  # last: what metrics.csv holds has been shown

    def _sample(self, trainer: Trainer, module: FineTuner) -> Tensor:
        prompts, columns = self.config.prompts, range(self.config.num_images)
        swap = self.ema.swapped_in(module) if self.ema else contextlib.nullcontext()
        with torch.no_grad(), swap, trainer.precision_plugin.forward_context():
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
        return images


def measure(images: Tensor, prompts: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Returns the metrics of images (N, 3, H, W) in [0, 1], as many for each prompt in turn, and
    the prompts with their luminance as captions."""
    by_prompt = images.float().cpu().unflatten(0, (len(prompts), -1))
    metrics: dict[str, float] = {}
    captions, errors = [], []
    for prompt, slug, rows in zip(prompts, prompt_slugs(prompts), by_prompt, strict=True):
        luminance = {"image": image_luminance(rows), "border": border_luminance(rows)}
        metrics[f"preview/luminance_{slug}"] = luminance["image"].mean().item()
        metrics[f"preview/border_luminance_{slug}"] = luminance["border"].mean().item()
        target = luminance_target(prompt)
        where = target.where if target else "image"
        caption = f"{shorten(prompt, CAPTION_LENGTH)}: {where} luminance "
        caption += f"{luminance[where].mean():.3f}"
        if target:
            errors.append((luminance[where] - target.value).abs().mean().item())
            caption += f", wanted {target.value:g}"
        captions.append(caption)
    if errors:
        metrics["preview/luminance_error"] = sum(errors) / len(errors)
    return metrics, captions
