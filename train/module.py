"""The LightningModule: the training step of Lin et al. 2023, and the optimizer.

It owns what is trained: the UNet, or its adapters (train/lora.py), and, where it is asked for, the
learned uncertainty. All that is frozen stays in the DiffusionModel, which is no nn.Module, so it is
neither saved, averaged, wrapped nor counted.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blackpoint.sampling.conditioning import Conditioning, joined
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import derive_seed
from blackpoint.sampling.prediction import add_noise, training_target
from blackpoint.sampling.runtime.speed import checkpoint_gradients
from blackpoint.sampling.runtime.transfer import sent
from blackpoint.train.cluster.device import COMPUTE_DTYPE
from blackpoint.train.cluster.sharding import whole
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import learning_rate_factor, with_learning_rate
from blackpoint.train.draws import BatchDraws, Draws
from blackpoint.train.dropout import SampleSeeds, add_dropout
from blackpoint.train.lora import checkpoint_record, trained_part
from blackpoint.train.loss import scale_errors, scale_weights, squared_error
from blackpoint.train.optimizer import OneByOne, build_optimizer, skip_unless_finite
from blackpoint.train.uncertainty import LearnedUncertainty
from blackpoint.train.weighting import loss_weights

Batch = dict[str, Any]
CAPTION_CACHE_BYTES = 64 * 2**20
ENCODED = ("image", "moments", "prompt_embeds", "pooled", "sizes")
"""Tensors of a batch that the network's input is made of."""
NUMBERS = ("epoch", "index", "position")
"""Tensors of a batch that draws are made of."""


class FineTuner(LightningModule):
    """Fine-tunes `model.unet` to `model.process`; see `losses` and `objective`.

    The training step gives callbacks `losses`, each sample's loss without weight or uncertainty, so
    that runs of different weights compare, of the network's own output; the same at every scale,
    `scales`; `t`; and `objective`, the number that is minimised.
    """

    def __init__(self, model: DiffusionModel, config: TrainConfig) -> None:
        super().__init__()
        self.config = config = with_learning_rate(config)
        self.model = model
        seeds, drops = SampleSeeds(), config.dropout.probability or config.lora.dropout
        self.dropout_seeds = seeds if drops else None
        self.draw = BatchDraws(
            config.seed,
            model.process.schedule.num_steps,
            config.loss,
            channels=model.latent_shape()[0],
            pixels_per_side=model.vae_scale,
            posterior=self.has_posterior,
            dropout=bool(drops),
        )
        side = config.data.resolution // model.downsampling_factor
        add_dropout(model.unet, config.dropout, side, seeds)
        dtype = COMPUTE_DTYPE[config.trainer.precision]
        self.unet = trained_part(model.unet, config.lora, config.seed, dtype, seeds)
        if config.trainer.precision == "bf16-true":
            torch.nn.Module.to(model.unet, dtype)  # whose own warns of modules that it lacks
        model.unet.train()
        if config.trainer.gradient_checkpointing:
            checkpoint_gradients(model.unet, config.trainer.gradient_checkpointing_levels)
        self.weights = loss_weights(config.loss, model.process.schedule)
        self._weights = self.weights.float()  # on the device, once it is known
        self.uncertainty = (
            LearnedUncertainty(model.process.schedule.num_steps)
            if config.loss.uncertainty
            else None
        )
        # Numbers, not a buffer: nothing to move to the device, or to broadcast, at every step.
        weights = scale_weights(config.loss.pool_factors, config.loss.scale_weights)
        self.scale_weights: list[float] = weights.tolist()
        self.gradient_norm: Tensor | None = None
        self.base_digest = ""  # of the UNet that the run started from, where it is known
        self.encodes = True  # images or captions, in every step
        self._captions: OrderedDict[str, Conditioning] = OrderedDict()

    def setup(self, stage: str) -> None:
        self.model.to(self.trainer.strategy.root_device)
        with self.encoders_at_hand():
            pass  # and where no step needs them, back to the CPU

    @contextlib.contextmanager
    def encoders_at_hand(self) -> Iterator[None]:
        """Has the encoders on the device inside a `with` block; they wait on the CPU outside of it
        where no step needs them."""
        for part in self.model.loaded_parts()[1:]:
            part.to(self.model.device)
        yield
        for part in () if self.encodes else self.model.loaded_parts()[1:]:
            part.to("cpu")

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        draws = self.draws(batch).to(self.device)
        if self.dropout_seeds is not None:
            self.dropout_seeds.of_batch = draws.dropout_seeds
        output, target = self.predict(batch, draws)
        scales = scale_errors(output, target, self.config.loss.pool_factors)  # (S, B)
        weighted = torch.stack([w * x for w, x in zip(self.scale_weights, scales, strict=True)])
        loss = self.objective(weighted.sum(dim=0), draws.t).mean()
        # One that is not finite makes all gradients so, on every process: that step is left out.
        loss = loss * (1 + 0 * loss.detach())
        watched = {"losses": scales[0].detach(), "scales": scales.detach(), "t": draws.t}
        return {"loss": loss, "objective": loss.detach(), **watched}

    def draws(self, batch: Batch) -> Draws:
        """Returns the draws of the batch's samples in their epochs: those that were made where it
        was read, or the same, made now."""
        return batch["draws"] if "draws" in batch else self.draw(batch)

    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        """Returns ||target - output||^2 / (CHW) for each sample, (B,) float32, at full size."""
        return squared_error(*self.predict(batch, draws))

    def predict(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Returns the network's output and its target, both of x0's shape."""
        process, draws = self.model.process, draws.to(self.device)
        x0 = self.encode(batch, draws.posterior_noise)  # (B, C, H/f, W/f), or pixels
        condition = self.condition(batch)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.schedule.at(draws.t))
        x_t = add_noise(x0, draws.perturbed(draws.eps), alpha, sigma)
        if self.config.trainer.precision == "bf16-true":
            x_t, condition = x_t.bfloat16(), condition.to(torch.bfloat16)
        output = self.model.network(x_t, draws.t, condition)
        return output, training_target(process.prediction_type, x0, draws.eps, alpha, sigma)

    def objective(self, losses: Tensor, t: Tensor) -> Tensor:
        """Returns w(t) L, or w(t) L / exp(u(t)) + u(t), of losses (B,) and t (B,)."""
        self._weights = sent(self._weights, losses.device)
        weighted = self._weights[sent(t, losses.device)] * losses
        if self.uncertainty is None:
            return weighted
        uncertainty = self.uncertainty(t)
        return weighted / uncertainty.exp() + uncertainty

    @property
    def has_posterior(self) -> bool:
        """Whether x0 is drawn from an autoencoder's posterior; pixels are x0 themselves."""
        return self.model.pixels is None

    @property
    def is_weighted(self) -> bool:
        """Whether the objective differs from the plain mean of the losses."""
        if self.uncertainty is not None or len(self.scale_weights) > 1:
            return True
        return bool((self.weights != 1).any())

    def latent_shape(self, batch: Batch) -> tuple[int, ...]:
        """Returns the shape of one x0 for a batch of images or of moments."""
        return self.draw.shape(batch)

    @torch.no_grad()
    def encode(self, batch: Batch, posterior_noise: Tensor | None) -> Tensor:
        """Returns x0, float32, from moments or from uint8 images; a VAE has its own precision."""
        with torch.autocast(self.device.type, enabled=False):
            if "moments" in batch:
                return self.model.draw_latents(batch["moments"], posterior_noise)
            return self.model.encode(batch["image"].float() / 255, posterior_noise)

    def condition(self, batch: Batch) -> Conditioning:
        """Returns the UNet's conditioning: embeddings of the batch, or of its captions, and the
        sizes of its pictures where the UNet is told them."""
        if "prompt_embeds" in batch:
            condition = Conditioning(batch["prompt_embeds"], batch.get("pooled"))
        elif self.model.tokenizer is not None:
            condition = self.embed(batch["caption"])
        else:  # classes are looked up, and nothing is known of nothing
            captions = batch["caption"]
            captions = [""] * len(captions) if self.model.is_unconditional else captions
            return self.model.encode_prompts(captions)
        if self.model.is_xl:
            condition = replace(condition, time_ids=batch["sizes"].float())
        return condition

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Conditioning:
        """Returns the embeddings of captions, keeping the latest: the text encoders are frozen.

        On a CPU captions are encoded one by one: a matrix product's last bit depends on the number
        of its rows, and a resumed run, whose cache starts empty, must repeat every bit.
        """
        embeds = {c: self._captions[c] for c in captions if c in self._captions}
        new = list(dict.fromkeys(c for c in captions if c not in embeds))
        size = 1 if self.device.type == "cpu" else max(len(new), 1)
        for start in range(0, len(new), size):
            chunk = new[start : start + size]
            rows = self.model.encode_prompts(chunk, max_tokens=self.config.data.max_tokens)
            # Copies, by `joined`: a slice would keep the whole chunk in memory.
            embeds |= {c: joined([rows[row : row + 1]]) for row, c in enumerate(chunk)}
        for caption in captions:
            self._captions[caption] = embeds[caption]
            self._captions.move_to_end(caption)
        largest = CAPTION_CACHE_BYTES // embeds[captions[0]].prompt_embeds.nbytes
        while len(self._captions) > largest:
            self._captions.popitem(last=False)
        return joined([embeds[caption] for caption in captions])

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Moves encoded inputs and draws; the numbers of samples, where they are drawn for, go.

        DDP would copy those too, and let the host wait.
        """
        moved = {name: sent(batch[name], device) for name in ENCODED if name in batch}
        if "draws" not in batch:
            return batch | moved
        rest = {name: value for name, value in batch.items() if name not in NUMBERS}
        return rest | moved | {"draws": batch["draws"].to(device)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer and its learning rate's course (train/config/learning_rate.py)."""
        settings = self.config.optimizer
        optimizer = build_optimizer(self.unet.parameters(), settings)
        if self.uncertainty is not None:
            group = {
                "params": list(self.uncertainty.parameters()),
                "lr": self.config.loss.uncertainty_learning_rate,
                "weight_decay": 0.0,
            }
            optimizer.add_param_group(group)
        is_rounded = (
            self.config.trainer.precision == "bf16-true" and settings.rounding == "stochastic"
        )
        if is_rounded or settings.fused_backward:
            seed = self.config.seed
            optimizer = OneByOne(
                optimizer,
                (lambda: derive_seed(seed, "rounding", self.global_step)) if is_rounded else None,
            )
            if settings.fused_backward:
                optimizer.step_in_backward()
        max_steps = self.config.trainer.max_steps
        rate = LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm of the trained weights, and keeps that norm for the metrics.

        Where it is not finite the weights stay as they are; train/callbacks/watch.py stops the run
        when it next looks. Weights that were updated in the backward pass have no gradient left to
        clip.
        """
        if isinstance(optimizer, OneByOne) and optimizer.is_in_backward:
            self.gradient_norm = optimizer.take_gradient_norm()
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if scaler is not None and fused:  # Lightning leaves unscaling to it: too late to clip
            scaler.unscale_(optimizer)
        parameters = optimizer.param_groups[0]["params"]  # without walking modules
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.gradient_norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(
                parameters, gradient_clip_val, self.gradient_norm, foreach=True
            )
        if scaler is None:  # which leaves out such steps by itself
            skip_unless_finite(optimizer, self.gradient_norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the batches that are done in those of now: accumulate_grad_batches may differ.

        Lightning steps the optimizer where their count is a multiple of that.
        """
        done = checkpoint["global_step"] * self.config.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            more = done - counts["ready"]
            counts |= {name: count + more for name, count in counts.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records, in plain containers, base and process of the weights, and what they are."""
        base = Path(self.model.source)
        checkpoint["blackpoint"] = {
            "base": str(base.resolve()) if base.exists() else self.model.source,
            "process": self.model.process.to_diffusers(),
            **checkpoint_record(self.config.lora, self.base_digest),
        }
        added = asdict(self.config.single_file)
        if any(added.values()):
            checkpoint["blackpoint"]["single_file"] = added
