"""A scheduler that hands a pipeline's loop the timesteps that we want and keeps what it hears.

The pipeline's own scheduler goes on making the timesteps, so that shifts and the levels that depend
on the number of tokens stay the pipeline's. The loop sees latents as they are: unit noise at the
start, no scaling of the network's input.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from blackpoint.data.files.errors import UserError

Advance = Callable[[Tensor, Tensor], Tensor]
"""(output of the network after guidance, latents) -> the next latents."""


class Catcher:
    """Stands in for `scheduler`, which answers all that is not asked here.

    `choose` takes the scheduler's timesteps to those that the loop gets, `advance` a step.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.choose: Callable[[Tensor], Tensor] = lambda timesteps: timesteps[:0]
        self.advance: Advance = lambda output, latents: latents

        @functools.wraps(scheduler.set_timesteps)  # its signature says what pipelines may pass
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            scheduler.set_timesteps(*args, **kwargs)
            self.timesteps = self.choose(scheduler.timesteps)

        self.set_timesteps = set_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns the sample."""
        return sample

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *, return_dict: bool = True, **_: Any
    ) -> Any:
        """Takes the network's output; raises UserError for one that is none of the latents'."""
        shapes = [getattr(part, "shape", None) for part in (model_output, sample)]
        if None in shapes or shapes[0] != shapes[1]:
            raise UserError(
                f"the pipeline steps its scheduler with {shapes[0]} for latents of {shapes[1]}: a "
                "learned variance, or a loop of another kind"
            )
        latents = self.advance(model_output, sample).to(sample.dtype)
        return SimpleNamespace(prev_sample=latents) if return_dict else (latents,)
