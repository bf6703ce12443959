"""The size of the weights, block by block, and how far their average lags behind them.

    weights/norm = ||w||,   weights/ema_distance = ||average - w|| / ||w||

A norm that grows without end tells of a learning rate too high for the weight decay; a distance
that does not settle tells of an average that is too slow for the length of the run.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.callbacks.watch import Watch
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner


class WeightsWatch(Callback):
    """Logs weights/norm, weights/norm_<block> of the UNet and, if averaged, weights/ema_distance.

    Every `every_steps` optimizer steps and at the last; one reading of the device each time.
    """

    def __init__(self, every_steps: int, watch: Watch, ema: Ema | None) -> None:
        self.every_steps, self.watch, self.ema = every_steps, watch, ema

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == trainer.max_steps
        if not (due and self.watch.at_step_end and trainer.is_global_zero):
            return
        assert isinstance(pl_module, FineTuner)
        with self.watch.paused():
            numbers = weight_norms(pl_module.unet)
            if self.ema is not None:
                numbers["weights/ema_distance"] = self.ema.distance(pl_module)
            values = torch.stack(list(numbers.values())).tolist()
            log_metrics(trainer, dict(zip(numbers, values, strict=True)))


@torch.no_grad()
def weight_norms(unet: nn.Module) -> dict[str, Tensor]:
    """Returns the Euclidean norm of all weights and of each top-level block, as scalar tensors."""
    blocks = {name: list(block.parameters()) for name, block in unet.named_children()}
    norms = {
        f"weights/norm_{name}": nn.utils.get_total_norm(parameters, foreach=True).float()
        for name, parameters in blocks.items()
        if parameters
    }
    return {"weights/norm": torch.stack(list(norms.values())).norm(), **norms}
