"""A plain accelerate training loop, as people run it: the benchmark's peer in training.

Its structure is that of the public example of diffusers (examples/text_to_image), written anew: an
image folder through torchvision transforms and a shuffling DataLoader, accelerate.Accelerator, VAE
and text encoder for every batch, a DDPMScheduler, clip_grad_norm_, AdamW as torch builds it by
default, a learning rate schedule, diffusers' EMAModel, the loss gathered and logged at each step
and shown on a progress bar. With cached latents the folder holds a safetensors file per image.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.bench.bare import Steps
from blackpoint.scripts.bench.inputs import cached_files, captioned_images
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import settled_rate
from blackpoint.train.target_process import fine_tuned_process


class StepLog(GeneralTracker):
    """Appends one line per step, as our own metrics.csv does."""

    name = "step_log"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        with self.path.open("a", encoding="ascii") as file:
            file.write(f"{step},{values}\n")


class ImageFolder(Dataset):
    """Images through torchvision transforms, and their captions."""

    def __init__(self, folder: Path, resolution: int) -> None:
        self.files = captioned_images(folder)
        self.transform = transforms.Compose(
            [
                transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR),
                transforms.RandomCrop(resolution),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path, caption = self.files[index]
        return self.transform(Image.open(path).convert("RGB")), caption


class CachedFolder(Dataset):
    """Cached moments and prompt embeddings, a file per sample."""

    def __init__(self, folder: Path) -> None:
        self.files = cached_files(folder)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return load_file(self.files[index])


def accelerate_loop(config: TrainConfig, folder: Path, cached: bool, ema: bool, log: Path) -> Steps:
    """Returns a function that takes optimizer steps; its settings are those of `config`."""
    steps = _loop(config, folder, cached, ema, log)

    def take(count: int) -> None:
        for _ in range(count):
            next(steps)

    return take


def _loop(config: TrainConfig, folder: Path, cached: bool, ema: bool, log: Path) -> Iterator[None]:
    settings = config.optimizer
    accelerator = Accelerator(cpu=True, log_with=StepLog(log))
    model = DiffusionModel.load(str(config.checkpoint))
    process = fine_tuned_process(config, model.process)
    scheduler = DDPMScheduler.from_config(process.to_diffusers())
    unet = model.unet.requires_grad_(True).train()
    average = EMAModel(unet.parameters(), decay=config.ema.decay) if ema else None
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=settled_rate(settings),
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
    )
    loader = _loader(config, model, folder, cached)
    lr_scheduler = get_scheduler(
        "constant_with_warmup", optimizer, num_warmup_steps=settings.warmup_steps
    )
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(
        unet, optimizer, loader, lr_scheduler
    )
    accelerator.init_trackers("text2image")
    scaling, steps_done = model.vae.config.scaling_factor, 0
    with open(os.devnull, "w") as nowhere:
        bar = tqdm(total=config.trainer.max_steps, desc="Steps", file=nowhere)
        while True:
            for batch in loader:
                with accelerator.accumulate(unet):
                    latents, embeds = _encode(model, batch, cached)
                    latents = latents * scaling
                    noise = torch.randn_like(latents)
                    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
                    noisy = scheduler.add_noise(latents, noise, t)
                    target = scheduler.get_velocity(latents, noise, t)
                    output = unet(noisy, t, embeds).sample
                    loss = F.mse_loss(output.float(), target.float(), reduction="mean")
                    gathered = accelerator.gather(loss.repeat(config.batch_size)).mean().item()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(unet.parameters(), config.trainer.gradient_clip)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                if average is not None:
                    average.step(unet.parameters())
                bar.update(1)
                steps_done += 1
                accelerator.log({"train_loss": gathered}, step=steps_done)
                rate = lr_scheduler.get_last_lr()[0]
                bar.set_postfix(step_loss=loss.detach().item(), lr=rate)
                yield


def _loader(config: TrainConfig, model: DiffusionModel, folder: Path, cached: bool) -> DataLoader:
    def collate(samples: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
        tokens = model.tokenizer(
            [caption for _, caption in samples],
            max_length=model.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        pixels = torch.stack([pixels for pixels, _ in samples])
        return {"pixel_values": pixels, "input_ids": tokens.input_ids}

    images: Dataset = (
        CachedFolder(folder) if cached else ImageFolder(folder, config.data.resolution)
    )
    return DataLoader(
        images,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,  # batches of one size, so that steps are worth the same
        collate_fn=None if cached else collate,
        num_workers=config.data.num_workers or 0,
    )


@torch.no_grad()
def _encode(model: DiffusionModel, batch: dict[str, Tensor], cached: bool) -> tuple[Tensor, Tensor]:
    if cached:
        mean, log_variance = batch["moments"].float().chunk(2, dim=1)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return latents, batch["prompt_embeds"].float()
    latents = model.vae.encode(batch["pixel_values"]).latent_dist.sample()
    return latents, model.text_encoder(batch["input_ids"])[0]
