"""Signals: a flag that a command looks at where nothing is half done, and whom they reach.

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away. Where a command has passed no
safe point for long - imports, loading - there is nothing to finish, and it is left at once. Else a
signal only sets the flag, and the next safe point leaves; a second Ctrl-C acts at once.

    with stoppable():                  # in the verb
        for batch in batches:
            stop_if_asked()            # between two batches

What leaves is no Exception, so that no library keeps it. Compiled libraries that call Python may
turn it into an error of their own, and Python drops it in __del__: such an error counts as the
stop, and what was dropped is made good at the next safe point.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from blackpoint.data.files.errors import Resumable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that a scheduler sends before it kills."""
STOP_SIGNALS = {signal.SIGINT, *SIGNALS}
RESUMABLE_STATUS = 75  # EX_TEMPFAIL of sysexits.h
LOOK_EVERY_S = 5
POLL_S = 0.5
NO_SAFE_POINT_S = 20.0
"""Time without a safe point after which a command is not waited for."""


class Stopped(SystemExit):
    """A signal stops the command; its message is the signal's name."""

    def __init__(self, name: str) -> None:
        super().__init__(RESUMABLE_STATUS)
        self.name = name

    def __str__(self) -> str:
        return f"stopped by {self.name}; the same command continues"


@dataclass
class _Flag:
    received: str = ""
    """Name of the first signal."""
    safe_point_s: float = -math.inf
    """When the last safe point was passed."""
    has_raised: bool = False
    """Whether the command is being left: an error that follows may be a library's word for it."""
    deferred: str = ""
    """Work that is finished first, where another than `stop_if_asked` looks at the flag."""
    process: int = field(default_factory=os.getpid)


_flag = _Flag()


def received() -> str:
    """Returns the name of the signal that has come, or ""."""
    return _flag.received


def stop_if_asked() -> None:
    """Is a safe point: leaves, by Stopped or KeyboardInterrupt, if a signal has come."""
    if not _flag.deferred:
        _flag.safe_point_s = time.monotonic()
        if _flag.received:
            raise _stop()


def sleep(seconds: float) -> None:
    """Sleeps, at a safe point."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        stop_if_asked()
        time.sleep(min(left, POLL_S))


def listen() -> None:
    """Makes a scheduler's signals stop this process, from here on to its end."""
    global _flag
    _flag = _Flag()
    for number in SIGNALS:
        signal.signal(number, _receive)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns a scheduler's signal into Resumable, and Ctrl-C into KeyboardInterrupt."""
    with _handled(_Flag(_flag.received)):
        try:
            yield
        except (Exception, Stopped) as error:
            if not isinstance(error, Stopped) and not _flag.has_raised:
                raise
            stop = error if isinstance(error, Stopped) else _stop()
            raise (Resumable(str(stop)) if isinstance(stop, Stopped) else stop) from None


@contextlib.contextmanager
def deferred(work: str) -> Iterator[None]:
    """Only sets the flag inside the block, whose owner looks at it: `work` is finished first."""
    with _handled(_Flag(_flag.received, deferred=work)):
        yield


@contextlib.contextmanager
def _handled(flag: _Flag) -> Iterator[None]:
    global _flag
    before, _flag = _flag, flag
    handlers = {number: signal.signal(number, _receive) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _flag = before


def _receive(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _flag.process or _flag.has_raised:
        return  # a forked worker, which SLURM signals too; or the command tidies up already
    _flag.received = _flag.received or signal.Signals(number).name
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not _flag.deferred and time.monotonic() - _flag.safe_point_s > NO_SAFE_POINT_S:
        raise _stop()
    work = _flag.deferred or "what is under way, then stopping"
    text = f"\n{signal.Signals(number).name}: finishing {work}\n"
    # Not print: the signal may have interrupted one.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


def _stop() -> Stopped | KeyboardInterrupt:
    _flag.has_raised = True
    return KeyboardInterrupt() if _flag.received == "SIGINT" else Stopped(_flag.received)


@contextlib.contextmanager
def left_by_sigterm() -> Iterator[None]:
    """Leaves a command that can't be continued through its finally blocks, with status 143."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Blocks stop signals for good in the processes started here: their parent ends them.

    Here it comes after the block. Within a fork Python would lose an interrupt: what is
    raised in a hook of `os.fork` is printed and ignored.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> Callable[[int], None]:
    """Returns the worker_init_fn of a DataLoader whose workers the calling process starts.

    Only the parent's own SIGTERM ends such a worker. A scheduler such as SLURM signals every
    process of a job, and the step under way is finished with the workers. A parent that closes its
    loader, or ends, sends SIGTERM too, and waits for the end; the two are told apart by their
    sender. A parent that is killed sends nothing, so its workers look every few seconds whether it
    is there: torch's own watch begins too late to miss one that died before it.
    """
    return functools.partial(_leave_signals_to, os.getpid())


def _leave_signals_to(parent: int, worker: int) -> None:
    if not hasattr(signal, "sigtimedwait"):  # not Linux, and no SLURM
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    is_child = os.getppid() == parent  # of a fork server, Python 3.14's default, it is not
    while os.getppid() == parent or (not is_child and is_alive(parent)):
        info = signal.sigtimedwait(STOP_SIGNALS, LOOK_EVERY_S)
        if info and info.si_signo == signal.SIGTERM and info.si_pid == parent:
            break
    os._exit(128 + signal.SIGTERM)


def is_alive(process: int) -> bool:
    """Tells whether a process runs; on Linux one that is dead and not asked about yet does not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; no /proc; no process has such a number
        return True
    return state.rpartition(")")[2].split()[0] != "Z"
