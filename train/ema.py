"""The exponential moving average of the weights that are trained, with a warm-up of the decay.

    average <- average + (1 - d_n) (weights - average),   d_n = min(d, (1 + n) / (10 + n))

n counts the updates so far; the first (n = 0) copies the weights. With a constant decay of .999,
half of the average after 700 steps would still be the model that the run started from. Updated
every k steps, the average decays by the product of the k steps' decays.

It is float32 whatever the weights are: a decay of .9999 moves a bfloat16 by less than the half gap
that rounding takes away, and rounding at random would leave noise of about a gap in the export.
What is too much for a GPU goes into the memory of the CPU (ema.device).
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim.swa_utils import AveragedModel

from blackpoint.train.cluster.sharding import ShardedStrategy, own_rows, whole
from blackpoint.train.lora import tree_of


def ema_decay(num_updates: int, decay: float) -> float:
    """Returns d_n, the decay of the update that follows `num_updates` earlier ones."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Average(AveragedModel):
    """The averaged copy. It lists its tensors once: to walk the modules costs as much as to add."""

    def __init__(
        self, owned: Module, device: torch.device, decay: float, every_steps: int = 1
    ) -> None:
        super().__init__(owned, device=device, use_buffers=False)
        self.float()
        self.decay, self.every_steps = decay, every_steps
        # On a GPU, reading it at every step would wait for all work queued there.
        self.n_averaged = torch.tensor(0)
        self._pairs: tuple[list[Tensor], list[Tensor], bool] | None = None

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Moves the average towards the weights of `model`, whose tensors must stay the same."""
        if self._pairs is None:
            both = (self.module, model)
            averages, weights = ([own_rows(one) for one in of.parameters()] for of in both)
            self._pairs = averages, weights, are_alike(averages, weights)
        averages, weights, is_at_once = self._pairs
        num_updates = int(self.n_averaged)
        steps = range(num_updates * self.every_steps, (num_updates + 1) * self.every_steps)
        rate = 1 - math.prod(ema_decay(n, self.decay) for n in steps)
        if not num_updates:
            torch._foreach_copy_(averages, weights)
        elif is_at_once:
            torch._foreach_lerp_(averages, weights, rate)
        else:  # one tensor at a time in memory
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight.to(average), rate)
        self.n_averaged += 1


def are_alike(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Tells whether tensors are on the devices and in the number formats of others."""
    pairs = zip(ones, others, strict=True)
    return all(one.device == other.device and one.dtype == other.dtype for one, other in pairs)


class Ema(WeightAveraging):
    """Averages what the LightningModule owns, which is what is trained; on its device, or the CPU.

    In checkpoints `state_dict` holds the average and `current_model_state` the weights themselves.
    """

    def __init__(self, decay: float, every_steps: int = 1, on_cpu: bool = False) -> None:
        super().__init__()
        self.decay, self.every_steps, self.on_cpu = decay, every_steps, on_cpu

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the owned modules; Lightning's own copy would take everything attached to them."""
        if stage != "fit":
            return
        owned: Module = torch.nn.ModuleDict(dict(pl_module.named_children()))
        if isinstance(trainer.strategy, ShardedStrategy):  # whose modules can't be copied
            named = pl_module.named_parameters()
            owned = tree_of({name: Parameter(weight.detach().clone()) for name, weight in named})
        # Not pl_module.device: the weights move to the GPU after this hook, and an average left
        # behind on the CPU would fetch them all at every step.
        device = torch.device("cpu") if self.on_cpu else trainer.strategy.root_device
        self._average_model = Average(owned, device, self.decay, self.every_steps)

    @torch.no_grad()
    def distance(self, pl_module: LightningModule) -> Tensor:
        """Returns ||average - weights|| / ||weights||, a scalar; one tensor at a time in memory."""
        assert self._average_model is not None
        weights = list(pl_module.parameters())
        averages = self._average_model.module.parameters()
        pairs = zip(averages, weights, strict=True)
        norms = [whole((a - weight.to(a)).norm()) for a, weight in pairs]
        size = whole(torch.nn.utils.get_total_norm(weights, foreach=True))
        return torch.stack(norms).norm().to(size.device) / size

    @contextlib.contextmanager
    def swapped_in(self, pl_module: LightningModule) -> Iterator[None]:
        """Puts the averaged weights into the module for the length of a `with` block."""
        assert self._average_model is not None
        weights, averages = list(pl_module.parameters()), self._average_model.module.parameters()
        if are_alike(averages, weights):
            self._swap_models(pl_module)
            try:
                yield
            finally:
                self._swap_models(pl_module)
            return
        # The weights may be coarser than the average, which must not pass through them.
        kept = [weight.detach().to("cpu", copy=True) for weight in weights]
        self._copy_average_to_current(pl_module)
        try:
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.data.copy_(value)
