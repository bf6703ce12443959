"""The optimizer: AdamW (Loshchilov and Hutter 2019), with its state in 32 or in 8 bits.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr weight_decay w - lr m' / (sqrt(v') + epsilon),   m', v' without their bias to 0

m and v are twice the size of the weights. In 8 bits (Dettmers et al. 2022) each block of 256 values
shares one float32 scale, which leaves about half a weight's size for both.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from blackpoint.train.config.config import OptimizerConfig
from blackpoint.train.config.learning_rate import settled_rate

EIGHT_BIT_MIN_VALUES = 4096  # bitsandbytes keeps 32 bits for smaller tensors


def build_optimizer(parameters: Iterable[Parameter], settings: OptimizerConfig) -> Optimizer:
    """Builds AdamW; in 32 bits it is fused, which needs no temporaries the size of the model."""
    options: dict[str, Any] = {
        "lr": settled_rate(settings),
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # optional: the extra eight-bit

        return AdamW8bit(parameters, **options)
    return AdamW(parameters, fused=True, **options)


def eight_bit_problem(device: torch.device) -> str | None:
    """Takes one 8-bit step on `device`; returns why it fails, or None."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError:
        return "bitsandbytes is not installed"
    except Exception as error:  # it looks for the GPU's libraries while it is imported
        return f"bitsandbytes cannot be imported ({type(error).__name__}: {error})"
    weight = Parameter(torch.zeros(EIGHT_BIT_MIN_VALUES, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        AdamW8bit([weight], lr=1.0, weight_decay=0.0).step()
    except Exception as error:  # its kernels report a missing device in their own ways
        return f"its 8-bit step fails on {device.type} ({type(error).__name__}: {error})"
    moved = -weight.detach()
    if not torch.allclose(moved, torch.ones_like(moved), atol=0.05):  # the first step is lr * sign
        return f"its 8-bit step on {device.type} is wrong"
    return None
