"""Signals in a loader's worker processes: only the parent's own SIGTERM ends one.

A scheduler such as SLURM signals every process of a job, and the step under way is finished with
the workers. A parent that closes its loader, or ends, sends SIGTERM too, and waits for the end; the
two are told apart by their sender. A parent that is killed sends nothing, so its workers look every
few seconds whether it is there: torch's own watch begins too late to miss one that died before it.
"""

import functools
import os
import signal
import threading
from collections.abc import Callable

from blackpoint.data.work.workers import STOP_SIGNALS

LOOK_EVERY_S = 5


def leave_signals_to_parent() -> Callable[[int], None]:
    """Returns the worker_init_fn of a DataLoader whose workers the calling process starts."""
    return functools.partial(_leave_signals_to, os.getpid())


def _leave_signals_to(parent: int, worker: int) -> None:
    if not hasattr(signal, "sigtimedwait"):  # not Linux, and no SLURM
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait(STOP_SIGNALS, LOOK_EVERY_S)
        if received and received.si_signo == signal.SIGTERM and received.si_pid == parent:
            break
    os._exit(128 + signal.SIGTERM)
