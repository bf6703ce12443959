"""`blackpoint train`: fine-tunes a checkpoint as its config says."""

from train.config import TrainConfig
from train.run import fit


def config_class() -> type[TrainConfig]:
    return TrainConfig


def run(config: TrainConfig) -> int:
    return fit(config)
