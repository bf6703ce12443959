"""Several processes search together: each has prompts of its own and writes files of its own.

Process r of n takes every n-th prompt, from the r-th on, and writes its rows to parts/r/. They meet
in the output folder alone, so torchrun or srun can start them without a rendezvous. The first waits
for the others and joins all rows, in the order of prompts and candidates. A search may be continued
with another number of processes: whoever has a prompt reads what any of them has written of it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.signals import sleep
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.runtime.tasks import Task

PARTS, STOPPED = "parts", "stopped"
POLL_S, TELL_AFTER_S = 0.5, 30.0
Item = TypeVar("Item")
log = logging.getLogger(__name__)


def own_folder(output: Path, task: Task) -> Path:
    """Returns where this process writes its rows."""
    return output if task.count == 1 else output / PARTS / f"{task.rank:04d}"


def files_of(output: Path, name: str) -> list[Path]:
    """Returns the files of this name, of the whole search and of its parts."""
    paths = [output / name, *sorted((output / PARTS).glob(f"*/{name}"))]
    return [path for path in paths if path.is_file()]


def share_of(items: Sequence[Item], task: Task) -> list[Item]:
    """Returns the work of this process."""
    return list(items[task.rank :: task.count])


def wait_until(is_done: Callable[[], bool], output: Path, since: float) -> None:
    """Waits for the work of other processes; raises RunFailed where one has stopped with an error.

    since: time of this process's start; errors of earlier starts are not this one's.
    """
    started_s, has_told = time.monotonic(), False
    while not is_done():
        if reason := stopped(output, since):
            raise RunFailed(reason)
        if not has_told and time.monotonic() - started_s > TELL_AFTER_S:
            has_told = True
            log.warning("output=%s: waiting for the other processes", output)
        sleep(POLL_S)


def stopped(output: Path, since: float) -> str:
    """Says which process of this start has stopped with an error, and why; "" if none has."""
    for path in output.parent.glob(f".{output.name}.{STOPPED}-*"):
        try:
            if path.stat().st_mtime >= since:
                number, reason = path.name.rpartition("-")[2], path.read_text(encoding="utf-8")
                return f"process {number} stopped: {reason}"
        except FileNotFoundError:
            continue
    return ""


def tell_stop(output: Path, task: Task, reason: str) -> None:
    """Leaves word beside the folder for the processes that wait for this one."""
    if task.count > 1:
        write_whole(_stop_file(output, task), reason)


def forget_stop(output: Path, task: Task) -> None:
    """Removes the word that an earlier start of this process has left."""
    _stop_file(output, task).unlink(missing_ok=True)


def _stop_file(output: Path, task: Task) -> Path:
    return output.parent / f".{output.name}.{STOPPED}-{task.rank}"
