"""Classifier-free guidance and guidance rescale, on the network's raw output.

    out = u + w (c - u)                                              Ho and Salimans 2022
    out <- phi out std(c) / std(out) + (1 - phi) out                 Lin et al. 2023, section 3.4

Both branches are one batched call; at scale 1 only the conditional branch is evaluated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError

Output = Float[Tensor, "b c h w"]
Condition = TypeVar("Condition")


@dataclass(frozen=True)
class Guidance:
    """Guidance scale w, rescale phi and the timesteps at which guidance is on."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[int, int] | None = None  # timesteps (low, high), both included; None: all

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise UserError(f"guidance_scale={self.scale} must be at least 0; 1 switches it off")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale={self.rescale} must lie in 0..1; .5 to .75 is usual")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise UserError(
                f"guidance_interval={self.interval} must be two timesteps, the lower first"
            )

    def is_on(self, t: int) -> bool:
        """Tells whether timestep t needs both branches."""
        within = self.interval is None or self.interval[0] <= t <= self.interval[1]
        return self.scale != 1 and within


NO_GUIDANCE = Guidance()


def rescale_guidance(guided: Output, conditional: Output, phi: float) -> Output:
    """Pulls the std of each sample (over C, H, W) towards that of the conditional output."""
    axes = (1, 2, 3)
    ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (phi * ratio + (1 - phi))


def guided_output(
    predict: Callable[[Tensor, Condition], Tensor],
    x_t: Output,
    t: int,
    conditional: Condition,
    both: Condition | None,
    guidance: Guidance,
) -> Output:
    """Evaluates `predict(x, condition)` with guidance; returns float32 (B, C, H, W).

    `both` holds the B unconditional rows and then the conditional ones; it is needed where guidance
    is on. NFE: one row per image where guidance is off, two where it is on.
    """
    if not guidance.is_on(t):
        return predict(x_t, conditional).float()
    if both is None:
        raise ValueError("guidance needs the unconditional rows too")
    u, c = predict(torch.cat([x_t, x_t]), both).float().chunk(2)
    guided = u + guidance.scale * (c - u)
    return rescale_guidance(guided, c, guidance.rescale) if guidance.rescale else guided
