"""The validation loss, for each range of log SNR and as one number.

Every held-out sample has one t and one eps, the same at each validation, so that curves show the
model and not the draws. The samples take turns over the ranges, and the last timestep is a range of
its own: at zero terminal SNR the fine-tune is won or lost there. The one number weighs each range
by its share of timesteps; it estimates the training loss without loss weights, learned uncertainty
or options of the draws, so that runs which differ in those compare.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from train.draws import draw_validation
from train.ema import Ema
from train.metrics import log_metrics
from train.module import FineTuner
from train.snr_bins import snr_bins
from train.watch import Watch, sum_over_processes


class ValidationLoss(Callback):
    """Logs validation/loss and validation/loss_<range>, of the averaged weights if any."""

    def __init__(self, every_steps: int, watch: Watch, ema: Ema | None) -> None:
        self.every_steps, self.watch, self.ema = every_steps, watch, ema
        self.measured: tuple[int, float] | None = None
        """The step of the last validation, and its loss."""
        self._loader: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == trainer.max_steps
        if self._loader is None or not (due and self.watch.at_step_end):
            return
        assert isinstance(pl_module, FineTuner)
        with self.watch.paused():
            metrics = self.measure(trainer, pl_module)
            log_metrics(trainer, metrics)
            if "validation/loss" in metrics:
                self.measured = step, metrics["validation/loss"]

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: FineTuner) -> dict[str, float]:
        """Returns the metrics over the whole validation loader."""
        schedule = module.model.process.schedule
        bins = snr_bins(schedule)
        ranges = list(bins.values())
        totals = torch.zeros(2, len(ranges), dtype=torch.float64)  # sums of losses, counts
        swap = self.ema.swapped_in(module) if self.ema else torch.no_grad()
        module.unet.eval()  # nothing is dropped out of a measurement
        with swap, trainer.precision_plugin.forward_context():
            for batch in self._loader:
                trainer.datamodule.account(batch["replaced"], training=False)  # type: ignore[attr-defined]
                indices = batch["index"].tolist()
                which = torch.tensor([index % len(ranges) for index in indices])
                shape = module.latent_shape(batch)
                chosen = [ranges[row] for row in which.tolist()]
                draws = draw_validation(module.config.seed, indices, chosen, shape)
                batch = module.transfer_batch_to_device(batch, module.device, 0)
                losses = module.losses(batch, draws).cpu().double()
                totals.index_add_(1, which, torch.stack([losses, torch.ones_like(losses)]))
        module.unet.train()
        totals = sum_over_processes(trainer, totals)
        means = (totals[0] / totals[1]).tolist()
        seen = [row for row, count in enumerate(totals[1].tolist()) if count]
        shares = [high - low for low, high in ranges]
        metrics = {f"validation/loss_{name}": means[i] for i, name in enumerate(bins) if i in seen}
        if seen:
            weighted = sum(means[row] * shares[row] for row in seen)
            metrics["validation/loss"] = weighted / sum(shares[row] for row in seen)
        return metrics
