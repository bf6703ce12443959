"""How bright a prompt asks its image to be, and how far an image is from that.

A prompt names its luminance ("on a black background", "a solid white image"), or its file gives the
range that a photograph of it has, `"luminance": [low, high]` from 0 black to 1 white, null where it
is open: configs/prompts/brightness.jsonl has solid tones, nights, snow, and prompts that leave it
open. The ranges of scenes are ours, wide on purpose: a model whose images cannot leave a middle
gray misses them, and taste does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from data.files.errors import UserError
from sampling.evaluation.luminance import border_luminance, image_luminance
from sampling.evaluation.prompt_luminance import luminance_target
from sampling.prompts import Prompt

FIELD = "luminance"


@dataclass(frozen=True)
class LuminanceRange:
    """The luminance that is asked for, and where in the image."""

    low: float
    high: float
    where: Literal["border", "image"] = "image"


def luminance_range(prompt: Prompt) -> LuminanceRange | None:
    """Returns what the prompt's file says, or else its text; None where it is left open."""
    if FIELD in prompt.metadata:
        given = prompt.metadata[FIELD]
        if given is None:
            return None
        if not _is_range(given):
            raise UserError(
                f"prompt {prompt.index} ({prompt.text!r:.60}): {FIELD}={given!r} must be "
                "[low, high] with 0 <= low <= high <= 1, or null"
            )
        return LuminanceRange(float(given[0]), float(given[1]))
    target = luminance_target(prompt.text)
    return None if target is None else LuminanceRange(target.value, target.value, target.where)


def luminance_error(
    images: Float[Tensor, "n 3 h w"], ranges: Sequence[LuminanceRange]
) -> Float[Tensor, " n"]:
    """Returns each image's distance to its range, 0 inside it; images in [0, 1]."""
    low, high = (
        torch.tensor([getattr(each, end) for each in ranges]).to(images) for end in ("low", "high")
    )
    at_border = torch.tensor([each.where == "border" for each in ranges], device=images.device)
    found = torch.where(at_border, border_luminance(images), image_luminance(images))
    return torch.maximum(low - found, found - high).clamp(min=0)


def _is_range(given: object) -> bool:
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        return False
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in given):
        return False
    return 0 <= given[0] <= given[1] <= 1
