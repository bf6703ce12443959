"""Whether a pipeline driven step by step makes the image that it makes by itself.

One seed, two steps of DDIM: by the stock pipeline with its own scheduler (flow matching, whose
Euler step is DDIM's) or with diffusers' DDIM, and by us. Arguments of the call that the user set
may act on some steps alone, where a loop of one step would be wrong: with them all steps are walked
inside the pipeline's loop as well.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.pipelines.model import PipelineModel, chosen
from blackpoint.sampling.pipelines.texts import Texts
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import ddim_step, run

NUM_STEPS, SEED, PROMPT = 2, 0, "a photo"
LARGEST_DIFFERENCE, HALF_ROUNDINGS = 1e-3, 16
"""Of pixels in [0, 1]: in float32, and in a half precision so many times its rounding, if that is
more. The stock loop rounds latents at every step, and ours does not."""


@torch.no_grad()
def check_agreement(model: PipelineModel, guidance: Guidance, num_steps: int) -> float:
    """Returns the largest difference of pixels; raises UserError where it is too large.

    The process is spaced as `trailing` where it has a choice: diffusers' DDIM steps by T // S, and
    so leaves another list.
    """
    process: Any = model.process
    reference = model.scheduler
    if isinstance(process, Process):
        process = process.respaced("trailing")
        config = dict(reference.config) | {"timestep_spacing": "trailing", "clip_sample": False}
        reference = DDIMScheduler.from_config(config)
    ours = _image(model, process.grid(NUM_STEPS), guidance)
    theirs = model.stock(PROMPT, SEED, NUM_STEPS, guidance, reference)
    difference = _compared(model, ours, theirs, "two steps of the stock pipeline")
    if model.arguments.given and num_steps > NUM_STEPS:
        grid = model.process.grid(num_steps)
        ours, theirs = _image(model, grid, guidance), _walked(model, grid, guidance)
        what = f"{num_steps} steps in its own loop (an argument acts on some steps alone)"
        difference = max(difference, _compared(model, ours, theirs, what))
    return difference


def _image(model: PipelineModel, grid: SamplingGrid, guidance: Guidance) -> Tensor:
    denoise = model.denoiser(Texts.of([PROMPT]), None, guidance)
    return model.decode(run("ddim", denoise, grid, _start(model)).x)


def _start(model: PipelineModel) -> SampleState:
    return SampleState(model.noise([SEED], *model.sides).to(model.device))


def _walked(model: PipelineModel, grid: SamplingGrid, guidance: Guidance) -> Tensor:
    """Returns the image of DDIM inside one call of the pipeline."""
    read, state = model.process.reader(), _start(model)

    def advance(output: Tensor, _: Tensor) -> Tensor:
        nonlocal state
        t = grid.timesteps[state.step]
        state = ddim_step(lambda x, _: read(output.float(), x, t), grid, state, 0.0, None)
        return state.x

    model.call(
        Texts.of([PROMPT]),
        grid.num_steps,
        lambda listed: torch.cat([chosen(t, listed) for t in grid.timesteps]),
        advance,
        guidance,
        model.negative,
        latents=state.x.to(model.latent_dtype),
    )
    return model.decode(state.x)


def _compared(model: PipelineModel, ours: Tensor, theirs: Tensor, what: str) -> float:
    dtype = next(model.loaded_parts()[0].parameters()).dtype
    is_half = dtype.is_floating_point and dtype.itemsize < 4
    rounding = HALF_ROUNDINGS * torch.finfo(dtype).eps if is_half else 0.0
    largest = max(LARGEST_DIFFERENCE, rounding)
    difference = (ours - theirs).abs().max().item()
    if not difference <= largest:
        raise UserError(
            f"checkpoint={model.source}: an image that is made step by step differs by "
            f"{difference:.2g} from {what}, more than {largest:.2g}; leave out "
            "what pipeline sets, or give another checkpoint"
        )
    return difference
