"""Work spread over processes, each fed through its own pipe.

No queue and no lock is shared: a process that is killed can't leave the others waiting, its pipe
just ends, and a process whose parent was killed finds the end of its own pipe and stops. Processes
are spawned, not forked, and import only what the function needs. `concurrent.futures` keeps neither
law: its processes hold both ends of their queue and outlive a killed parent for ever, and before
Python 3.14 it can end none that is at work.
"""

import itertools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed
from blackpoint.data.files.signals import POLL_S, signals_held_back, stop_if_asked

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
Advance = Callable[[int], None]

ENDS_WITHIN_S = 5
MOST_WORKERS = 4
JOBS_AHEAD = 2
"""Jobs that a process has at most: one at work, one waiting, so that it never waits itself."""


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def loader_workers(asked: int | None, num_processes: int = 1) -> int:
    """Returns the workers of each of some processes on this machine: as asked, or else as many as
    it has cores for, at most 4."""
    most = max(1, usable_cores() // num_processes)
    return min(MOST_WORKERS, most) if asked is None else asked


def run_in_processes(
    function: Callable[[JobT, Advance], ResultT],
    jobs: Iterable[JobT],
    num_processes: int,
    advance: Advance,
    may_start_others: bool = False,
) -> Generator[ResultT, None, None]:
    """Yields function(job, advance) of each job as it ends, in any order; close it when done.

    `jobs` is read only as far as the processes keep up. One job, or one process, runs right here.
    Raises what the function raises, and RunFailed if a process is killed. `may_start_others`:
    the function starts processes, which Python forbids to those that it ends by itself.
    """
    jobs = iter(jobs)
    first = list(itertools.islice(jobs, 2))
    jobs = itertools.chain(first, jobs)
    if num_processes == 1 or len(first) < 2:
        for job in jobs:
            yield function(job, advance)
        return
    workers: list[_Worker] = []
    try:
        for job in jobs:
            if len(workers) < num_processes and all(worker.num_jobs for worker in workers):
                workers.append(_Worker(function, may_start_others))
            while min(worker.num_jobs for worker in workers) >= JOBS_AHEAD:
                yield from _collect(workers, advance, POLL_S)
            min(workers, key=lambda worker: worker.num_jobs).give(job)
            yield from _collect(workers, advance, 0)
        while any(worker.num_jobs for worker in workers):
            yield from _collect(workers, advance, POLL_S)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process and the parent's end of its pipe."""

    def __init__(self, function: Callable[[Any, Advance], Any], may_start_others: bool) -> None:
        context = multiprocessing.get_context("spawn")
        # The first process of all starts the tracker, and that would unblock the signals again.
        resource_tracker.ensure_running()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(function, theirs), daemon=not may_start_others
        )
        with signals_held_back():
            self.process.start()
        theirs.close()
        self.num_jobs = 0

    def give(self, job: Any) -> None:
        try:
            self.connection.send(job)
        except OSError:
            raise self.death() from None
        self.num_jobs += 1

    def death(self) -> RunFailed:
        """Returns the error that says how the process ended."""
        self.process.join(10)
        code = self.process.exitcode
        how = f"with exit status {code}"
        if code is not None and code < 0:
            how = f"by signal {-code}"
        hint = " (the system does that when memory runs out)" if code == -signal.SIGKILL else ""
        return RunFailed(f"a worker process was ended {how}{hint}")

    def stop(self) -> None:
        self.connection.close()
        if not self.num_jobs:  # the end of its pipe ends it, and it tidies up
            self.process.join(ENDS_WITHIN_S)
        self.process.kill()
        self.process.join()


def _collect(workers: list[_Worker], advance: Advance, timeout_s: float) -> Iterator[Any]:
    """Reads the messages of the processes and yields the results among it; a safe point."""
    stop_if_asked()
    by_connection = {worker.connection: worker for worker in workers}
    for connection in wait(list(by_connection), timeout_s):
        worker = by_connection[connection]  # type: ignore[index]
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            raise worker.death() from None
        if kind == "advance":
            advance(content)
        elif kind == "error":
            raise content
        else:
            worker.num_jobs -= 1
            yield content


def _work(function: Callable[[Any, Advance], Any], connection: Connection) -> None:
    """Is the life of a process: jobs come in, results go out, until the pipe ends."""
    while True:
        try:
            job = connection.recv()
            try:
                answer = (
                    "result",
                    function(job, lambda count: connection.send(("advance", count))),
                )
            except (ConnectionError, KeyboardInterrupt):
                raise
            except (WriteFailed, RunFailed, UserError) as error:
                answer = ("error", error)
            except Exception:
                answer = ("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            connection.send(answer)
        except (EOFError, ConnectionError):  # the parent is gone
            return
