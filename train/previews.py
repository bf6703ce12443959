"""Preview grids: the training model's pictures at fixed prompts and seeds, as it learns."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from sampling.pictures import caption_grid, to_picture
from train.config import PreviewConfig
from train.ema import Ema
from train.module import FineTuner
from train.watch import Watch


class Previews(Callback):
    """Writes previews/step_00000500.png, with the averaged weights if there are any."""

    def __init__(self, folder: Path, config: PreviewConfig, watch: Watch, ema: Ema | None) -> None:
        self.folder, self.config, self.watch, self.ema = folder, config, watch, ema

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.config.every_steps == 0 or step == trainer.max_steps
        if not (due and self.watch.at_step_end and trainer.is_global_zero):
            return
        assert isinstance(pl_module, FineTuner)
        with self.watch.paused():
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step_{step:08d}.png"
            pictures = [to_picture(image) for image in self._sample(trainer, pl_module)]
            columns = self.config.num_images
            rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
            titles = [f"step {step}, seed {seed}" for seed in range(columns)]
            caption_grid(self.config.prompts, rows, titles).save(path)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("previews", [str(path)], step=step)

    def _sample(self, trainer: Trainer, module: FineTuner) -> Tensor:
        prompts, columns = self.config.prompts, range(self.config.num_images)
        swap = self.ema.swapped_in(module) if self.ema else contextlib.nullcontext()
        with torch.no_grad(), swap, trainer.precision_plugin.forward_context():
            module.unet.eval()
            images = module.model.sample(
                [prompt for prompt in prompts for _ in columns],
                seeds=[seed for _ in prompts for seed in columns],
                num_steps=self.config.num_steps,
                guidance_scale=self.config.guidance_scale,
                guidance_rescale=self.config.guidance_rescale,
                height=module.config.data.resolution,
                width=module.config.data.resolution,
                allow_unsound=module.config.allow_unsound,
            )
            module.unet.train()
        return images
