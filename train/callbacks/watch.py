"""What is watched at every step: the loss (which must stay finite), its gradient, speed and memory.

Numbers stay on the device until a row is due, so that a GPU is never made to wait for them.
`train/loss` is without loss weights, so that runs of one prediction type compare: it is the error
of the network's own output, v, eps or x0, by ranges of SNR too. Across prediction types only the
validation loss compares, which is of v (`blackpoint.train.callbacks.validation`). Where there are
weights or a learned uncertainty, what is minimised is `train/objective`.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.runtime.memory import memory_metrics
from blackpoint.train.callbacks.loader_clock import LoaderClock
from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.module import FineTuner
from blackpoint.train.snr_bins import snr_bins, totals_by_bin

REMEDY = (
    "No checkpoint was written after it, so the last one is good. Remedies: look at these samples, "
    "lower optimizer.learning_rate, or use trainer.precision=bf16-mixed or 32-true"
)


class Watch(Callback):
    """Logs what a step tells, by itself and by SNR; stops on a loss that is not finite.

    Rows are means over the micro-batches since the row before; a range of SNR that none of their
    samples fell into has no row. `train/data_wait_share` is the share of the time, pauses left
    out, that training stood waiting for the loader. Must come after the callback that
    averages the weights and before all others, which ask it whether an optimizer step has just
    ended (`at_step_end`) and let its clock rest while they work (`paused`).
    """

    def __init__(self, log_every_steps: int, batch_size: int) -> None:
        self.log_every_steps = log_every_steps
        self.batch_size = batch_size
        self.at_step_end = False
        self.images_per_s: float | None = None
        self.data_wait_share: float | None = None
        self.loss: float | None = None
        self._step = 0
        self._learning_rate = 0.0
        self._pending: list[tuple[int, list[str], Tensor]] = []  # step, sample keys, losses
        self._outputs: list[dict[str, Tensor]] = []  # since the last row
        self._num_images = 0
        self._clock = LoaderClock()
        self._started_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        trainer.profiler = self._clock  # type: ignore[attr-defined]
        self._started_s = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # the scheduler is about to move it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.at_step_end = step != self._step
        self._pending.append((self._step + 1, batch["key"], outputs["losses"]))
        self._outputs.append(outputs)
        self._num_images += self.batch_size
        self._step = step
        due = step % self.log_every_steps == 0 or step == trainer.max_steps
        if self.at_step_end and due:
            self._log(trainer, pl_module)
        elif pl_module.device.type == "cpu":
            self.check_finite(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses to save what a loss that is not finite has spoilt."""
        self.check_finite(trainer, pl_module)

    def check_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises `RunFailed` if a loss since the last check, or the gradient, is not finite."""
        pending, self._pending = self._pending, []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        checked = [losses.sum() for _, _, losses in pending]
        if self.at_step_end and not scaled:  # a loss scaler skips such steps by itself
            checked.append(_gradient_norm(pl_module))
        if not checked or math.isfinite(torch.stack(checked).sum().item()):
            return
        for step, keys, losses in pending:
            pairs = zip(keys, losses.tolist(), strict=True)
            bad = [key for key, loss in pairs if not math.isfinite(loss)]
            if bad:
                raise RunFailed(
                    f"the loss of step {step} is not finite for {len(bad)} of {len(keys)} samples "
                    f"of the batch: {', '.join(bad[:16])}. {REMEDY}"
                )
        raise RunFailed(
            f"the gradient of step {self._step} is not finite, though its loss is; samples of the "
            f"batch: {', '.join(pending[-1][1][:16]) if pending else 'seen before'}. {REMEDY}"
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of a `with` block out of images/s."""
        begun_s = time.perf_counter()
        yield
        self._started_s += time.perf_counter() - begun_s

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FineTuner)
        self.check_finite(trainer, pl_module)
        outputs, self._outputs = self._outputs, []
        means = [
            torch.stack([output["losses"].mean() for output in outputs]).mean(),
            torch.stack([output["objective"] for output in outputs]).mean(),
            _gradient_norm(pl_module),
        ]
        means += torch.stack([output["scales"].mean(dim=1) for output in outputs]).mean(dim=0)
        reduced = trainer.strategy.reduce(torch.stack(means), reduce_op="mean").tolist()
        self.loss, objective, gradient_norm, *by_scale = reduced
        by_snr = self._loss_by_snr(trainer, pl_module, outputs)
        now_s = time.perf_counter()
        elapsed_s = now_s - self._started_s
        self.images_per_s = self._num_images / elapsed_s
        self.data_wait_share = min(1.0, self._clock.take() / elapsed_s)
        metrics = {"train/loss": self.loss}
        if pl_module.is_weighted:
            metrics["train/objective"] = objective
        factors = pl_module.config.loss.pool_factors
        if len(by_scale) > 1:
            metrics |= {f"train/loss_pool_{p}": x for p, x in zip(factors, by_scale, strict=True)}
        metrics |= {
            "train/gradient_norm": gradient_norm,
            "train/learning_rate": self._learning_rate,
            "train/images_per_s": self.images_per_s,
            "train/data_wait_share": self.data_wait_share,
        }
        log_metrics(trainer, metrics | by_snr | memory_metrics(pl_module.device))
        self._num_images = 0
        self._started_s = now_s

    @staticmethod
    def _loss_by_snr(
        trainer: Trainer, module: FineTuner, outputs: list[dict[str, Tensor]]
    ) -> dict[str, float]:
        schedule = module.model.process.schedule
        t = torch.cat([output["t"] for output in outputs])
        totals = totals_by_bin(schedule, t, torch.cat([output["losses"] for output in outputs]))
        totals = sum_over_processes(trainer, totals)
        names, (sums, counts) = snr_bins(schedule), totals.tolist()
        return {
            f"train/loss_{name}": total / count
            for name, total, count in zip(names, sums, counts, strict=True)
            if count
        }


def sum_over_processes(trainer: Trainer, totals: Tensor) -> Tensor:
    """Returns float64 `totals`, on the CPU, summed over all processes.

    A lone process keeps them there: Apple's MPS, which has no float64, trains in one only.
    """
    if trainer.world_size == 1:
        return totals
    device = trainer.strategy.root_device
    return trainer.strategy.reduce(totals.to(device), reduce_op="sum").cpu()


def _gradient_norm(pl_module: LightningModule) -> Tensor:
    norm = pl_module.gradient_norm
    assert isinstance(norm, Tensor)
    return norm.float()
