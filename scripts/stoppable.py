"""Verbs that a scheduler's signal stops, and that the same command continues."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sampling.errors import Resumable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it kills."""


class _Stopped(BaseException):
    """A signal came; the message is its name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns a signal, at any time inside the block, into Resumable."""
    previous = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        yield
    except _Stopped as stopped:
        raise Resumable(f"stopped by {stopped}; the same command continues") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: Any) -> None:
    """Leaves through the finally blocks; libraries catch Exception, so it is none."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise _Stopped(signal.Signals(number).name)
