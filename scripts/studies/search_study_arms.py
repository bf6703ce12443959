"""What the search study compares: prompts, and every algorithm at every budget."""

from dataclasses import dataclass, field
from typing import Any

from blackpoint.scripts.miniature.digits import BACKGROUNDS, DIGIT_NAMES, INKS, caption

NUM_STEPS = 6
PLAIN, STEPS, HACKED = "best-of-1", "more steps", "darkness"
MULTIPLES = (2, 4, 8, 16, 32)
FEWEST_NFE = 18 / 32
"""Share of best-of-32's NFE at which halving must keep most of its gain."""


@dataclass(frozen=True)
class Arm:
    """One search of all prompts: an algorithm at a budget."""

    name: str
    multiple: float
    """NFE a prompt over those of one image of NUM_STEPS steps."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of its folder."""
        return f"{self.name.replace(' ', '_').replace(',', '')}_{self.multiple:g}"


def study_prompts() -> list[str]:
    """Returns a third of all captions, 77: digits, inks and backgrounds in turn."""
    return all_captions()[::3]


def all_captions() -> list[str]:
    """Returns every digit in every ink on every background that the ink shows on."""
    return [
        caption(ink, digit, background)
        for digit in range(len(DIGIT_NAMES))
        for background in BACKGROUNDS
        for ink in INKS
        if ink != background
    ]


def study_arms() -> list[Arm]:
    """Returns every arm, the plain image first."""
    steps = [Arm(STEPS, m, {"num_steps": NUM_STEPS * m}) for m in MULTIPLES]
    searched = [
        Arm(name, multiple, {"algorithm": name})
        for name in ("random", "zero_order", "paths", "halving")
        for multiple in MULTIPLES
        if name != "paths" or multiple >= 8  # below, no round fits in
    ]
    few = Arm("halving", FEWEST_NFE * 32, {"algorithm": "halving"})
    stochastic = {"sampler": "ddim", "eta": 1.0}
    steering = {"algorithm": "fk_steering", "fk_steering.resample_every_steps": 2}
    particles = [Arm("fk_steering", m, steering | stochastic) for m in MULTIPLES]
    return [
        Arm(PLAIN, 1),
        *steps,
        *searched,
        few,
        Arm("best-of-1, eta 1", 1, stochastic),
        *particles,
        Arm("random, eta 1", 32, stochastic),
    ]


def hacked_arm() -> tuple[Arm, list[str]]:
    """Returns a search for something else than what is wanted, and its prompts.

    An image is dark, as "on a black background" asks, most of all without its digit.
    """
    return Arm(HACKED, 32), [text for text in all_captions() if "on a black" in text]
