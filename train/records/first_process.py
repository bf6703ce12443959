"""Duties of a run's first process: it writes, and tells the user on stderr."""

import sys

from lightning.pytorch.utilities.rank_zero import rank_zero_only


def is_first_process() -> bool:
    """Whether this process writes; known from the environment before a trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def say(text: str) -> None:
    """Tells the user where the run stands."""
    print(text, file=sys.stderr, flush=True)


def note(text: str | None) -> None:
    """Tells the user of a decision or a change that the run makes; of none where there is none."""
    if text:
        say(f"note: {text}")
