"""SIGTERM and SIGUSR1, from a command's first moment on; free of torch.

A scheduler sends them before it takes a machine away. Until training listens for itself
(train/callbacks/interruption.py) there is nothing to save, and the process leaves at once with
status 75. Python's own answer, death by the signal, would count as a crash.
"""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RESUMABLE_STATUS = 75  # EX_TEMPFAIL of sysexits.h

_received: list[str] = []


def listen() -> None:
    """Makes either signal end this process with status 75, wherever it stands."""
    for number in SIGNALS:
        signal.signal(number, _leave)


def received() -> bool:
    """Whether a signal came that did not end the process: some libraries swallow SystemExit."""
    return bool(_received)


def _leave(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    _received.append(name)
    # Not print: the signal may have interrupted one.
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2,
        f"\n{name}: stopping here; the same command continues\n".encode(),
    )
    raise SystemExit(RESUMABLE_STATUS)
