"""Verbs that a scheduler's signal stops, and that the same command continues."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from blackpoint.data.files.errors import Resumable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it kills."""
AGAIN_S = 0.01
"""Seconds until a stop that Python dropped is raised again."""


class _Stopped(BaseException):
    """A signal came; the message is its name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns a signal, at any time inside the block, into Resumable, and Ctrl-C as Python does.

    Compiled libraries that call Python may turn what a handler raised into an error of their own
    (safetensors: ValueError): every error that follows a signal counts as the stop. Where Python
    can raise nothing (__del__, the hooks that run at a fork) it drops what the handler raised: the
    stop is raised again a moment later.
    """
    stops = list[BaseException]()

    def stop(number: int, _frame: FrameType | None) -> None:
        """Leaves through the finally blocks; libraries catch Exception, so it is none."""
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        name = signal.Signals(number).name
        stops.append(KeyboardInterrupt() if number == signal.SIGINT else _Stopped(name))
        raise stops[-1]

    def again(_number: int, _frame: FrameType | None) -> None:
        raise stops[-1]

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if stops and unraisable.exc_value is stops[-1]:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            previous_hook(unraisable)

    previous_hook, sys.unraisablehook = sys.unraisablehook, dropped
    previous = {number: signal.signal(number, stop) for number in (*SIGNALS, signal.SIGINT)}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    try:
        yield
    except (Exception, _Stopped):
        if not stops:
            raise
        if isinstance(stops[-1], KeyboardInterrupt):
            raise stops[-1] from None
        raise Resumable(f"stopped by {stops[-1]}; the same command continues") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = previous_hook
        for number, handler in previous.items():
            signal.signal(number, handler)
