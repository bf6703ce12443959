"""Luminance: how near an image, or its border, comes to the gray that is asked for.

    score = -|mean luminance - target|

0 is best. Luminance as in `blackpoint.sampling.pixels.luminance`; exact, cheap, and without a
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blackpoint.sampling.prompts.brightness_target import LuminanceTarget
    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier


@dataclass
class LuminanceConfig(VerifierOptions):
    """Keys of kind=luminance."""

    target: float | None = None
    """luminance: the wanted mean, 0 black to 1 white; read from each prompt if not set."""
    where: Literal["border", "image"] = "image"
    """luminance: where the target holds; the border is the outer two pixels."""


def load(config: LuminanceConfig, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Makes the verifier; it has no weights."""
    import torch

    from blackpoint.sampling.pixels.luminance import border_luminance, image_luminance
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    def scores(images: Images, prompts: Sequence[str]) -> Tensor:
        targets = [target_of(config, prompt) for prompt in prompts]
        values = torch.tensor([target.value for target in targets], device=images.device)
        at_border = torch.tensor([t.where == "border" for t in targets], device=images.device)
        pixels = images.float()
        means = torch.where(at_border, border_luminance(pixels), image_luminance(pixels))
        return -(means - values).abs()

    return ImageVerifier(config, scores, check_prompt=lambda prompt: target_of(config, prompt))


def target_of(config: LuminanceConfig, prompt: str) -> LuminanceTarget:
    """Returns the wanted luminance; raises UserError where neither config nor prompt names it."""
    from blackpoint.sampling.prompts.brightness_target import LuminanceTarget, luminance_target

    if config.target is not None:
        return LuminanceTarget(config.target, config.where)
    target = luminance_target(prompt)
    if target is None:
        raise UserError(
            f"target: the prompt {prompt!r:.60} names no luminance (as 'on a black background' "
            "or 'a solid white image' do); give the verifier a target from 0 to 1"
        )
    return target


def check(config: LuminanceConfig) -> None:
    """Raises UserError for a target that no image has."""
    if config.target is not None and not 0 <= config.target <= 1:
        raise UserError(f"target={config.target} must be from 0 (black) to 1 (white)")


KIND = VerifierKind(load, LuminanceConfig, check, highest=lambda config: 0.0)
