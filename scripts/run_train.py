"""`blackpoint train`: fine-tunes a checkpoint as its config says."""

from data.errors import Unreachable
from sampling.errors import Resumable
from train.config import TrainConfig


def config_class() -> type[TrainConfig]:
    return TrainConfig


def run(config: TrainConfig) -> int:
    from train.run import fit

    try:
        return fit(config)
    except Unreachable as error:
        raise Resumable(str(error)) from error
