"""The validation loss, for each range of log SNR and as one number.

Every held-out sample has one t and one eps, the same at each validation, so that curves show the
model and not the draws. The samples take turns over the ranges, and the last timestep is a range of
its own: at zero terminal SNR the fine-tune is won or lost there. The one number weighs each range
by its share of timesteps; it estimates the training loss without loss weights, learned uncertainty
or options of the draws, so that runs which differ in those compare.

Whatever the network predicts, the loss is that of v, so that prediction types compare too:

    ||v - v_hat||^2 = ||eps - eps_hat||^2 / alpha^2 = ||x0 - x0_hat||^2 / sigma^2

for eps_hat or x0_hat read as v (`blackpoint.sampling.prediction`). Where alpha is 0 an eps
prediction has no v: such samples are left out, and with them the last timestep of an (unsound) eps
model at zero SNR. Divided by alpha^2 the noisiest samples of an eps model weigh most, divided by
sigma^2 the cleanest of an x0 model; so the best checkpoint is chosen by the error of the network's
own output, validation/epsilon_loss or validation/sample_loss.
"""

import contextlib
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.callbacks.snr_bins import snr_bins
from blackpoint.train.callbacks.step_metrics import sum_over_processes
from blackpoint.train.callbacks.watch import EverySteps, Watch
from blackpoint.train.draws import draw_validation
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner
from blackpoint.train.weighting import error_per_v_error


class ValidationLoss(EverySteps):
    """Logs validation/loss and validation/loss_<range>, of v and of the averaged weights if any.

    Beside them validation/epsilon_loss or validation/sample_loss, of a network that predicts those.
    """

    def __init__(self, every_steps: int, watch: Watch, ema: Ema | None) -> None:
        super().__init__(every_steps, watch)
        self.ema = ema
        self.measured: tuple[int, float] | None = None
        """The step of the last validation, and its loss, of the network's own output."""
        self._loader: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]

    def at_step(self, trainer: Trainer, module: FineTuner, step: int) -> None:
        if self._loader is None:
            return
        metrics = self.measure(trainer, module)
        log_metrics(trainer, metrics)
        kind = module.model.process.prediction_type
        name = "validation/loss" if kind == "v_prediction" else f"validation/{kind}_loss"
        if name in metrics:
            self.measured = step, metrics[name]

    def measure(self, trainer: Trainer, module: FineTuner) -> dict[str, float]:
        """Returns the metrics over the whole validation loader."""
        process = module.model.process
        bins = snr_bins(process.schedule)
        of_v, of_output = sum_over_processes(trainer, self._totals(trainer, module)).split(2)
        metrics = {
            f"validation/loss_{name}": total / count
            for name, total, count in zip(bins, *of_v.tolist(), strict=True)
            if count
        }
        kinds = {"validation/loss": of_v}
        if process.prediction_type != "v_prediction":
            kinds[f"validation/{process.prediction_type}_loss"] = of_output
        shares = [high - low for low, high in bins.values()]
        return metrics | {
            name: _overall(sums, counts, shares)
            for name, (sums, counts) in kinds.items()
            if counts.any()
        }

    @torch.no_grad()
    def _totals(self, trainer: Trainer, module: FineTuner) -> Tensor:
        """Returns this process's sums of losses and counts, of v and of the network's own output,
        by range of SNR: float64 (4, ranges)."""
        process = module.model.process
        ranges = list(snr_bins(process.schedule).values())
        per_v = error_per_v_error(process.prediction_type, process.schedule)
        totals = torch.zeros(4, len(ranges), dtype=torch.float64)
        swap = self.ema.swapped_in(module) if self.ema else contextlib.nullcontext()
        module.model.unet.eval()  # nothing is dropped out of a measurement
        with swap, trainer.precision_plugin.forward_context():
            for batch in self._loader:
                trainer.datamodule.account(batch["replaced"], training=False)  # type: ignore[attr-defined]
                indices = batch["index"].tolist()
                which = [index % len(ranges) for index in indices]
                draws = draw_validation(
                    module.config.seed,
                    indices,
                    [ranges[row] for row in which],
                    module.latent_shape(batch),
                    module.has_posterior,
                )
                batch = module.transfer_batch_to_device(batch, module.device, 0)
                losses = module.losses(batch, draws).cpu().double()
                scale = per_v[draws.t]
                has_v = scale > 0
                of_v = torch.where(has_v, losses / scale, 0.0)
                rows = torch.stack([of_v, has_v.double(), losses, torch.ones_like(losses)])
                totals.index_add_(1, torch.tensor(which), rows)
        module.model.unet.train()
        return totals


def _overall(sums: Tensor, counts: Tensor, shares: list[int]) -> float:
    """Returns the mean of the ranges that hold samples, each weighed by its share of timesteps."""
    means = (sums / counts).tolist()
    seen = [row for row, count in enumerate(counts.tolist()) if count]
    return sum(means[row] * shares[row] for row in seen) / sum(shares[row] for row in seen)
