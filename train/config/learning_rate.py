"""The learning rate and its course: a linear warm-up and, if wanted, a decay to 0; no torch."""

import math
from dataclasses import replace

from blackpoint.train.config.config import OptimizerConfig, TrainConfig

OF_WEIGHTS, OF_ADAPTERS = 1e-5, 1e-4
"""Learning rates of a run that sets none: of the UNet's own weights, and of adapters."""


def with_learning_rate(config: TrainConfig) -> TrainConfig:
    """Returns the config with its learning rate, or that of what it trains where it sets none."""
    if config.optimizer.learning_rate is not None:
        return config
    rate = OF_WEIGHTS if config.lora.rank is None else OF_ADAPTERS
    return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))


def settled_rate(settings: OptimizerConfig) -> float:
    """Returns the learning rate of a config that is settled."""
    assert settings.learning_rate is not None, "with_learning_rate settles it"
    return settings.learning_rate


def learning_rate_factor(step: int, settings: OptimizerConfig, max_steps: int) -> float:
    """Returns the share of the learning rate at optimizer step `step`, 0 the first."""
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    match settings.decay:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case _:
            return 1.0


def warmup_note(settings: OptimizerConfig, max_steps: int) -> str:
    """Returns what is to be known of a warm-up that is longer than the run, else ""."""
    if settings.warmup_steps < max_steps:
        return ""
    rate = settled_rate(settings)
    reached = rate * learning_rate_factor(max_steps - 1, settings, max_steps)
    return (
        f"optimizer.warmup_steps={settings.warmup_steps} is no less than "
        f"trainer.max_steps={max_steps}: the learning rate rises to {reached:.3g} and never "
        f"reaches optimizer.learning_rate={rate:g}"
    )
