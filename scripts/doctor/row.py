"""Rows of the doctor's table: what was looked at, how it is, and what to do about it.

green: works. yellow: works as far as it goes, and the remedy says what does not. red: broken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["green", "yellow", "red"]
STATUSES: tuple[Status, ...] = ("green", "yellow", "red")
"""From the best to the worst."""


@dataclass(frozen=True)
class Row:
    """One finding; the remedy is empty where there is nothing to do."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


Probe = Callable[[], Iterator[Row | str]]
"""Yields rows, and names of what it comes to next: it may crash or hang there. Picklable."""


def one_line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
