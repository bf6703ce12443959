"""Waiting for other processes on a machine that may be busy, and looking at what they move."""

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 600.0
"""Until a test gives up: no bound of what is tested, and far above what anything here takes."""


def wait_for(
    condition: Callable[[], object], is_running: Callable[[], bool] = lambda: True
) -> None:
    """Polls until the condition holds; fails if what should bring it about has ended."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert is_running() or condition(), "it ended before"
        assert time.monotonic() < until_s, f"not within {PATIENCE_S} s"
        time.sleep(0.01)


def names_in(folder: Path) -> list[str]:
    """Lists a folder that another process may make, rename or remove: [] while it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
