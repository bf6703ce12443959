"""Jobs for the tests of blackpoint.data.work.workers: spawned processes import them by name."""

import os
import signal
from collections.abc import Callable


def double(number: int, advance: Callable[[int], None]) -> int:
    """Returns twice the number and counts it."""
    advance(1)
    return 2 * number


def fail_at_three(number: int, advance: Callable[[int], None]) -> int:
    """Is wrong for job 3."""
    if number == 3:
        raise LookupError("job three")
    return number


def die_at_three(number: int, advance: Callable[[int], None]) -> int:
    """Is killed at job 3, as the system does when memory runs out."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def blocked_signals(number: int, advance: Callable[[int], None]) -> set[int]:
    """Returns the signals that don't reach the process."""
    return {int(blocked) for blocked in signal.pthread_sigmask(signal.SIG_BLOCK, set())}
