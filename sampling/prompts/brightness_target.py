"""What a prompt says about luminance, and what measurements of its images are called.

"a red three on a dark gray background" fixes the border of the image, "a solid black background"
the whole of it; most prompts fix nothing. Luminance as in
`blackpoint.sampling.pixels.luminance`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TONES = {"black": 0.0, "dark gray": 0.25, "gray": 0.5, "light gray": 0.75, "white": 1.0}
SLUG_LENGTH = 60

_TONE = "(black|(?:dark |light )?gray|white)"
_BACKGROUND = re.compile(rf"\bon an? (?:solid |plain |pure )?{_TONE} background\b")
_SOLID = re.compile(
    rf"(?:an? )?(?:solid|plain|pure) {_TONE}(?: (?:background|image|picture|canvas|color|colour))?"
)


@dataclass(frozen=True)
class LuminanceTarget:
    """The luminance that a prompt asks for, and where in the image."""

    value: float
    where: Literal["border", "image"]


def luminance_target(prompt: str) -> LuminanceTarget | None:
    """Returns what the prompt fixes, 0 black to 1 white; None where it leaves luminance open."""
    text = " ".join(prompt.lower().replace("grey", "gray").strip(" .").split())
    if match := _SOLID.fullmatch(text):
        return LuminanceTarget(TONES[match[1]], "image")
    if match := _BACKGROUND.search(text):
        return LuminanceTarget(TONES[match[1]], "border")
    return None


def prompt_slugs(prompts: Sequence[str]) -> list[str]:
    """Returns a name of [a-z0-9_] for each prompt, no two the same, by which metrics are called."""
    slugs: list[str] = []
    for number, prompt in enumerate(prompts):
        words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")
        slug = words[:SLUG_LENGTH].strip("_") or f"prompt_{number}"
        while slug in slugs or slug == "error":  # preview/luminance_error is the mean error
            slug = f"{slug}_{number}"
        slugs.append(slug)
    return slugs
