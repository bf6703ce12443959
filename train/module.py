"""The LightningModule: the training step of Lin et al. 2023, and the optimizer.

It owns the UNet and nothing else. The frozen VAE and text encoder stay in the DiffusionModel, which
is no nn.Module, so they are neither saved, averaged, wrapped nor counted.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sampling.model import DiffusionModel
from sampling.prediction import add_noise, training_target
from train.config import TrainConfig
from train.draws import Draws, draw
from train.loss import squared_error, uniform_weights

Batch = dict[str, Any]
CAPTION_CACHE_BYTES = 64 * 2**20


class FineTuner(LightningModule):
    """Fine-tunes `model.unet` to `model.process`; see `losses` for the training step."""

    def __init__(self, model: DiffusionModel, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.unet = model.unet
        self.unet.requires_grad_(True).train()
        if config.trainer.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.weights = uniform_weights(model.process.schedule.num_steps)
        self.gradient_norm: Tensor | None = None
        self._captions: OrderedDict[str, Tensor] = OrderedDict()

    def setup(self, stage: str) -> None:
        self.model.to(self.device)

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        shape = self.model.latent_shape(*batch["image"].shape[-2:])
        num_timesteps = self.model.process.schedule.num_steps
        epochs, indices = batch["epoch"].tolist(), batch["index"].tolist()
        draws = draw(self.config.seed, epochs, indices, shape, num_timesteps)
        losses = self.losses(batch, draws)
        return {"loss": losses.mean(), "losses": losses.detach()}

    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        """Returns w(t) ||target - output||^2 / (CHW) for each sample, (B,) float32."""
        process, t = self.model.process, draws.t.to(self.device)
        x0 = self.encode(batch["image"], draws.posterior_noise)  # (B, C, H/8, W/8)
        prompt_embeds = self.embed(batch["caption"])  # (B, L, D)
        eps = draws.eps.to(self.device)
        alpha, sigma = (c.to(self.device).view(-1, 1, 1, 1) for c in process.schedule.at(draws.t))
        x_t = add_noise(x0, eps, alpha, sigma)
        output = self.unet(x_t, t, encoder_hidden_states=prompt_embeds).sample
        target = training_target(process.prediction_type, x0, eps, alpha, sigma)
        return self.weights[draws.t].to(self.device) * squared_error(output, target)

    @torch.no_grad()
    def encode(self, images: Tensor, posterior_noise: Tensor) -> Tensor:
        """Returns scaled latents, float32, of uint8 images; the VAE runs in its own precision."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.encode(images.float() / 255, posterior_noise.to(self.device))

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        """Returns prompt embeddings (B, L, D), keeping the latest: the text encoder is frozen.

        On a CPU captions are encoded one by one: a matrix product's last bit depends on the number
        of its rows, and a resumed run, whose cache starts empty, must repeat every bit.
        """
        found = {c: self._captions[c] for c in captions if c in self._captions}
        new = list(dict.fromkeys(c for c in captions if c not in found))
        size = 1 if self.device.type == "cpu" else max(len(new), 1)
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(new), size):
                chunk = new[start : start + size]
                rows = self.model.encode_prompts(chunk).prompt_embeds
                found |= {c: row.clone() for c, row in zip(chunk, rows, strict=True)}
        for caption in captions:
            self._captions[caption] = found[caption]
            self._captions.move_to_end(caption)
        largest = CAPTION_CACHE_BYTES // found[captions[0]].nbytes
        while len(self._captions) > largest:
            self._captions.popitem(last=False)
        return torch.stack([found[caption] for caption in captions])

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Moves the images; what identifies the samples stays on the CPU, where it is read."""
        return batch | {"image": batch["image"].to(device, non_blocking=True)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds fused AdamW and the warm-up; fused needs no temporaries the size of the model."""
        settings = self.config.optimizer
        optimizer = AdamW(
            self.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        warmup = LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (settings.warmup_steps + 1))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": warmup, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm, and keeps that norm, computed once, for the metrics."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # Lightning leaves unscaling to a fused optimizer: too late to clip
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.gradient_norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters(), gradient_clip_val, self.gradient_norm, foreach=True
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records, in plain containers, what the weights mean: their base and their process."""
        base = Path(self.model.source)
        checkpoint["blackpoint"] = {
            "base": str(base.resolve()) if base.exists() else self.model.source,
            "process": self.model.process.to_diffusers(),
        }
