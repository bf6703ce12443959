"""The exponential moving average of the weights that are trained, with a warm-up of the decay.

    average <- average + (1 - d_n) (weights - average),   d_n = min(d, (1 + n) / (10 + n))

n counts the updates so far; the first (n = 0) copies the weights. With a constant decay of .999,
half of the average after 700 steps would still be the model that the run started from.
"""

import contextlib
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel


def ema_decay(num_updates: int, decay: float) -> float:
    """Returns d_n, the decay of the update that follows `num_updates` earlier ones."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Average(AveragedModel):
    """The averaged copy. It lists its tensors once: to walk the modules costs as much as to add."""

    def __init__(self, owned: Module, device: torch.device, decay: float) -> None:
        super().__init__(owned, device=device, use_buffers=False)
        self.decay = decay
        # On a GPU, reading it at every step would wait for all work queued there.
        self.n_averaged = torch.tensor(0)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Moves the average towards the weights of `model`, whose tensors must stay the same."""
        if self._pairs is None:
            self._pairs = list(self.module.parameters()), list(model.parameters())
        averages, weights = self._pairs
        num_updates = int(self.n_averaged)
        if num_updates:
            torch._foreach_lerp_(averages, weights, 1 - ema_decay(num_updates, self.decay))
        else:
            torch._foreach_copy_(averages, weights)
        self.n_averaged += 1


class Ema(WeightAveraging):
    """Averages what the LightningModule owns, which is what is trained; on its device.

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
        # Not pl_module.device: the weights move to the GPU after this hook, and an average left
        # behind on the CPU would fetch them all at every step.
        self._average_model = Average(owned, trainer.strategy.root_device, self.decay)

    @torch.no_grad()
    def distance(self, pl_module: LightningModule) -> Tensor:
        """Returns ||average - weights|| / ||weights||, a scalar; one tensor at a time in memory."""
        assert self._average_model is not None
        weights = list(pl_module.parameters())
        averages = self._average_model.module.parameters()
        pairs = zip(averages, weights, strict=True)
        differences = torch.stack([(average - weight).norm().float() for average, weight in pairs])
        return differences.norm() / torch.nn.utils.get_total_norm(weights, foreach=True)

    @contextlib.contextmanager
    def swapped_in(self, pl_module: LightningModule) -> Iterator[None]:
        """Puts the averaged weights into the module for the length of a `with` block."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)
