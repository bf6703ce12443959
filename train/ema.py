"""The exponential moving average of the UNet's weights, with a warm-up of the decay.

    average <- average + (1 - d_n) (weights - average),   d_n = min(d, (1 + n) / (10 + n))

n counts the updates so far; the first (n = 0) copies the weights. With a constant decay of .999,
half of the average after 700 steps would still be the model that the run started from.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


def ema_decay(num_updates: int, decay: float) -> float:
    """Returns d_n, the decay of the update that follows `num_updates` earlier ones."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Ema(WeightAveraging):
    """Averages what the LightningModule owns, which is the UNet; on the device of the weights.

    In checkpoints `state_dict` holds the average and `current_model_state` the weights themselves.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the owned modules; Lightning's own copy would take everything attached to them."""
        if stage != "fit":
            return
        owned = torch.nn.ModuleDict(dict(pl_module.named_children()))
        self._average_model = AveragedModel(
            owned, device=pl_module.device, multi_avg_fn=self._update, use_buffers=False
        )
        # Read at every step: on a GPU that would wait for all work queued there.
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _update(self, average: Any, weights: Any, num_averaged: Tensor | int) -> None:
        assert self._average_model is not None
        decay = ema_decay(int(self._average_model.n_averaged), self.decay)
        torch._foreach_lerp_(average, weights, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self, pl_module: LightningModule) -> Iterator[None]:
        """Puts the averaged weights into the module for the length of a `with` block."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)
