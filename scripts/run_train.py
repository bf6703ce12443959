"""`blackpoint train`: fine-tunes a checkpoint as its config says."""

from train.config import TrainConfig


def config_class() -> type[TrainConfig]:
    return TrainConfig


def run(config: TrainConfig) -> int:
    from train.run import fit

    return fit(config)
