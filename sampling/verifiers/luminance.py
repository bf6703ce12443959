"""Luminance: how near an image, or its border, comes to the gray that is asked for.

    score = -|mean luminance - target|

0 is best. Luminance as in `blackpoint.sampling.evaluation.luminance`; exact, cheap, and without a
model.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.luminance import border_luminance, image_luminance
from blackpoint.sampling.prompts.brightness_target import LuminanceTarget, luminance_target
from blackpoint.sampling.verifiers.batching import in_batches
from blackpoint.sampling.verifiers.verifier import Images


class Luminance:
    """Verifier of a luminance that is given, or read from each prompt where `target` is None."""

    preview_log_snr: float | None = None
    differentiable = True

    def __init__(
        self,
        target: float | None = None,
        where: Literal["border", "image"] = "image",
        name: str = "luminance",
        batch_size: int = 256,
    ) -> None:
        self.name = name
        self._fixed = None if target is None else LuminanceTarget(target, where)
        self._batch_size = batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns minus the distance to the target, from -1 to 0."""
        return in_batches(self._score, images, prompts, self._batch_size)

    def check_prompt(self, prompt: str) -> None:
        """Raises UserError where a prompt has no target."""
        self._target(prompt)

    def _score(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        targets = [self._target(prompt) for prompt in prompts]
        values = torch.tensor([target.value for target in targets], device=images.device)
        at_border = torch.tensor([t.where == "border" for t in targets], device=images.device)
        pixels = images.float()
        found = torch.where(at_border, border_luminance(pixels), image_luminance(pixels))
        return -(found - values).abs()

    def _target(self, prompt: str) -> LuminanceTarget:
        target = self._fixed or luminance_target(prompt)
        if target is None:
            raise UserError(
                f"target: the prompt {prompt!r:.60} names no luminance (as 'on a black background' "
                "or 'a solid white image' do); give the verifier a target from 0 to 1"
            )
        return target
