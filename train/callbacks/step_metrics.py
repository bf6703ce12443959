"""Metrics of the steps since the last row of metrics.csv, each a function of those steps.

METRICS of train/callbacks/watch.py lists them.

Losses are means over the micro-batches of all processes. `train/loss` is without loss weights, so
that runs of one prediction type compare: it is the error of the network's own output, v, eps or x0,
by ranges of SNR too; a range that no sample fell into has no number. Across prediction types only
the validation loss compares, which is of v (train/callbacks/validation.py). Where there are weights
or a learned uncertainty, what is minimised is `train/objective`.
"""

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from blackpoint.sampling.runtime.memory import memory_metrics
from blackpoint.train.callbacks.snr_bins import snr_bins, totals_by_bin
from blackpoint.train.module import FineTuner


@dataclass(frozen=True)
class Steps:
    """The steps since the last row, as one process saw them."""

    trainer: Trainer
    module: FineTuner
    outputs: list[dict[str, Tensor]]
    """Output of the training step for each micro-batch: train/module.py."""
    learning_rate: float
    images_per_s: float
    data_wait_share: float
    """Share of the time, pauses left out, that training stood waiting for the loader."""

    def mean(self, values: Tensor) -> list[float]:
        """Returns the means over all processes of `values` (N,)."""
        return self.trainer.strategy.reduce(values, reduce_op="mean").tolist()


def losses(steps: Steps) -> dict[str, float]:
    """The loss, the objective where that differs, and the loss at each scale if of several."""
    module, outputs = steps.module, steps.outputs
    means = [
        torch.stack([output["losses"].mean() for output in outputs]).mean(),
        torch.stack([output["objective"] for output in outputs]).mean(),
        *torch.stack([output["scales"].mean(dim=1) for output in outputs]).mean(dim=0),
    ]
    loss, objective, *by_scale = steps.mean(torch.stack(means))
    metrics = {"train/loss": loss}
    if module.is_weighted:
        metrics["train/objective"] = objective
    if len(by_scale) > 1:
        factors = module.config.loss.pool_factors
        metrics |= {f"train/loss_pool_{p}": x for p, x in zip(factors, by_scale, strict=True)}
    return metrics


def gradient_and_rate(steps: Steps) -> dict[str, float]:
    """The norm of the last gradient before it was clipped, and the learning rate."""
    [norm] = steps.mean(gradient_norm(steps.module)[None])
    return {"train/gradient_norm": norm, "train/learning_rate": steps.learning_rate}


def speed(steps: Steps) -> dict[str, float]:
    """Images per second of all processes, and the share of the time that the loader cost."""
    share = steps.data_wait_share
    return {"train/images_per_s": steps.images_per_s, "train/data_wait_share": share}


def losses_by_snr(steps: Steps) -> dict[str, float]:
    """The loss in each range of log SNR that samples fell into."""
    schedule = steps.module.model.process.schedule
    t, values = (torch.cat([output[key] for output in steps.outputs]) for key in ("t", "losses"))
    totals = sum_over_processes(steps.trainer, totals_by_bin(schedule, t, values))
    return {
        f"train/loss_{name}": total / count
        for name, total, count in zip(snr_bins(schedule), *totals.tolist(), strict=True)
        if count
    }


def memory(steps: Steps) -> dict[str, float]:
    """The most memory that this process has held: sampling/runtime/memory.py."""
    return memory_metrics(steps.module.device)


def gradient_norm(module: FineTuner) -> Tensor:
    """Returns the norm of the last gradient, a scalar on the device."""
    norm = module.gradient_norm
    assert isinstance(norm, Tensor)
    return norm.float()


def sum_over_processes(trainer: Trainer, totals: Tensor) -> Tensor:
    """Returns float64 `totals`, on the CPU, summed over all processes.

    A lone process keeps them there: Apple's MPS, which has no float64, trains in one only.
    """
    if trainer.world_size == 1:
        return totals
    device = trainer.strategy.root_device
    return trainer.strategy.reduce(totals.to(device), reduce_op="sum").cpu()
