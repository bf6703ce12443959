"""The learning rate's course: a linear warm-up and, if wanted, a decay to 0; free of torch."""

import math

from blackpoint.train.config.config import OptimizerConfig


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
    reached = settings.learning_rate * learning_rate_factor(max_steps - 1, settings, max_steps)
    return (
        f"optimizer.warmup_steps={settings.warmup_steps} is no less than "
        f"trainer.max_steps={max_steps}: the learning rate rises to {reached:.3g} and never "
        f"reaches optimizer.learning_rate={settings.learning_rate:g}"
    )
