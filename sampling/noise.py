"""Every random draw comes from a generator with a recorded integer seed.

Seed N means the latent that `torch.Generator("cpu").manual_seed(N)` draws in diffusers, in float32.
Seeds of later draws (a stochastic sampler's step, a search candidate) are hashes of what they
belong to, so no draw depends on the batch, the order or the number of processes.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hashes the parts to a seed in [0, 2^63), stable across machines and Python versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seeded_noise(seed: int, shape: Sequence[int]) -> Float[Tensor, "..."]:
    """Draws unit noise of `shape` in float32 on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "n ..."]:
    """Draws one latent of `shape` (C, H, W) a seed; returns (N, C, H, W) float32 on the CPU."""
    return torch.stack([seeded_noise(seed, shape) for seed in seeds])


def step_seeds(seeds: Sequence[int], step: int) -> list[int]:
    """Returns the seeds of the fresh noise of sampling step `step`, one per run."""
    return [derive_seed(seed, "step", step) for seed in seeds]
