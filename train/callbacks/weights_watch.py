"""The size of what is trained, block by block, and how far its average lags behind it.

    weights/norm = ||w||,   weights/ema_distance = ||average - w|| / ||w||

A norm that grows without end tells of a learning rate too high for the weight decay; a distance
that does not settle tells of an average that is too slow for the length of the run.
"""

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.callbacks.watch import EverySteps, Watch
from blackpoint.train.cluster.sharding import takes_part, whole
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner


class WeightsWatch(EverySteps):
    """Logs weights/norm, weights/norm_<block> of the UNet and, if averaged, weights/ema_distance.

    Of the adapters alone where they are what is trained. One reading of the device each time.
    """

    def __init__(self, every_steps: int, watch: Watch, ema: Ema | None) -> None:
        super().__init__(every_steps, watch)
        self.ema = ema

    def at_step(self, trainer: Trainer, module: FineTuner, step: int) -> None:
        if not takes_part(trainer):
            return
        numbers = weight_norms(module.unet)
        if self.ema is not None:
            numbers["weights/ema_distance"] = self.ema.distance(module)
        values = torch.stack(list(numbers.values())).tolist()
        log_metrics(trainer, dict(zip(numbers, values, strict=True)))


@torch.no_grad()
def weight_norms(unet: nn.Module) -> dict[str, Tensor]:
    """Returns the Euclidean norm of all weights and of each top-level block, as scalar tensors."""
    blocks = {name: list(block.parameters()) for name, block in unet.named_children()}
    norms = {
        f"weights/norm_{name}": whole(nn.utils.get_total_norm(parameters, foreach=True)).float()
        for name, parameters in blocks.items()
        if parameters
    }
    return {"weights/norm": torch.stack(list(norms.values())).norm(), **norms}
