"""Signals in a loader's worker processes: only the parent's own SIGTERM ends one.

A scheduler such as SLURM signals every process of a job, and the step under way is finished with
the workers. A parent that closes its loader, or ends, sends SIGTERM too, and waits for the end; the
two are told apart by their sender.
"""

import os
import signal
import threading

from data.workers import STOP_SIGNALS


def leave_signals_to_parent(worker: int) -> None:
    """Is the worker_init_fn of a DataLoader."""
    if not hasattr(signal, "sigwaitinfo"):  # not Linux, and no SLURM
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid in (parent, os.getppid()):
            os._exit(128 + signal.SIGTERM)
