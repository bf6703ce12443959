"""Preview grids: the training model's pictures at fixed prompts and seeds, as it learns."""

import contextlib
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.config import PreviewConfig
from train.ema import Ema
from train.module import FineTuner
from train.watch import Watch

CELL_PX, MARGIN_PX, FONT_PX = 128, 4, 12


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
            draw_grid(self._sample(trainer, pl_module), self.config.prompts, f"step {step}").save(
                path
            )
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


def draw_grid(images: Tensor, prompts: list[str], title: str) -> Image.Image:
    """Draws images (rows * columns, 3, H, W) in [0, 1], one row a prompt, the prompt above it."""
    columns = len(images) // len(prompts)
    scale = max(1, round(CELL_PX / images.shape[-1]))
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    font = ImageFont.load_default(FONT_PX)
    total = columns * (width + MARGIN_PX) + MARGIN_PX
    letters = max(10, int(total / font.getlength("n")))
    captions = [textwrap.wrap(prompt, letters) or [""] for prompt in prompts]
    line_px = FONT_PX + MARGIN_PX
    text_px = [line_px * len(lines) + MARGIN_PX for lines in captions]
    total_height = line_px + MARGIN_PX + sum(text_px) + len(prompts) * (height + MARGIN_PX)
    # Mid-gray around the pictures, so that black and white ones both stand out.
    sheet = Image.new("RGB", (total, total_height), (128, 128, 128))
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PX, MARGIN_PX // 2), title, (255, 255, 255), font)
    top = line_px
    cells = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for row, lines in enumerate(captions):
        pen.multiline_text((MARGIN_PX, top), "\n".join(lines), (255, 255, 255), font)
        top += text_px[row]
        for column in range(columns):
            cell = np.ascontiguousarray(cells[row * columns + column])
            picture = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN_PX + column * (width + MARGIN_PX), top))
        top += height + MARGIN_PX
    return sheet
