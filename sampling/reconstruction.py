"""Real images through inversion and back: which noise would paint this, and how well does it?

    x0 = encode(image),  e = invert(x0),  x0' = sample(e),  error = |x0' - x0| / |x0|

By an inverter of DDIM (sampling/inversion.py), or by BDIA, whose walk back from the pair of its
first two levels is exact whatever the image; the pair's other half at the clean end comes from one
naive step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from data.files.errors import UserError
from sampling.guidance import Guidance
from sampling.inversion import (
    Inverter,
    bdia_invert,
    bdia_resample,
    invert,
)
from sampling.model import DiffusionModel
from sampling.samplers import SampleState, run

NAIVE = Inverter("ddim")


@dataclass(frozen=True)
class Reconstruction:
    """What became of real images, float32 on the CPU."""

    noise: Float[Tensor, "n c h w"]
    images: Float[Tensor, "n 3 height width"]
    """Painted from `noise`, in [0, 1]."""
    error: Float[Tensor, " n"]
    """|x0' - x0| / |x0| of the latents."""


@torch.no_grad()
def reconstruct(
    model: DiffusionModel,
    images: Float[Tensor, "n 3 h w"],
    prompts: Sequence[str],
    num_steps: int = 25,
    inverter: Inverter | None = None,
    guidance_scale: float = 1.0,
    inversion_guidance_scale: float = 1.0,
    batch_size: int = 16,
) -> Reconstruction:
    """Inverts images in [0, 1] and paints them again; `inverter` None is BDIA.

    Raises UserError where an image's size is not one that the model can have, or where BDIA is to
    paint with another guidance than it inverts with.
    """
    if len(images) != len(prompts):
        raise UserError(f"{len(images)} images and {len(prompts)} prompts do not pair up")
    if inverter is None and guidance_scale != inversion_guidance_scale:
        raise UserError(
            f"guidance_scale={guidance_scale} with inversion_guidance_scale="
            f"{inversion_guidance_scale}: BDIA is exact for one denoiser; give both the same"
        )
    model.latent_shape(*images.shape[2:])
    model.process.check_sound()
    grid = model.process.grid(num_steps)
    if inverter is None and grid.num_steps < 2:
        raise UserError(f"num_steps={num_steps}: BDIA walks pairs of levels; take at least 2")
    empty = model.encode_prompts([""])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        condition = model.encode_prompts(list(prompts[rows]))
        x0 = model.encode(images[rows].to(model.device))
        unconditional = empty[torch.zeros(len(x0), dtype=torch.long, device=model.device)]
        forth, back = (
            model.denoiser(condition, unconditional, Guidance(scale))
            for scale in (guidance_scale, inversion_guidance_scale)
        )
        if inverter is None:
            before = invert(back, grid, x0, NAIVE.of(model.process), stop=grid.num_steps - 1).x
            noise, first = bdia_invert(back, grid, before, x0)
            again = bdia_resample(forth, grid, noise, first)[1]
        else:
            noise = invert(back, grid, x0, inverter.of(model.process)).x
            again = run("ddim", forth, grid, SampleState(noise)).x
        error = (again - x0).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)
        parts.append((noise.cpu(), model.decode(again).cpu(), error.cpu()))
    return Reconstruction(*(torch.cat(part) for part in zip(*parts, strict=True)))
