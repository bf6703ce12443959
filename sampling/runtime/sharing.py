"""Several processes search together: each has prompts of its own and writes files of its own.

Process r of n takes every n-th prompt, from the r-th on, and writes its rows to parts/r/. They meet
in the output folder alone, so torchrun or srun can start them without a rendezvous. The first waits
for the others and joins all rows, in the order of prompts and candidates. A search may be continued
with another number of processes: whoever has a prompt reads what any of them has written of it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.signals import sleep
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.runtime.tasks import Task

PARTS, STOPPED = "parts", "stopped"
POLL_S, TELL_AFTER_S = 0.5, 30.0
Item = TypeVar("Item")
log = logging.getLogger(__name__)


class FolderInUse(UserError):
    """Another process writes there."""


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


@contextlib.contextmanager
def telling_stop(output: Path, task: Task) -> Iterator[None]:
    """Where the block raises, leaves word beside the folder for the processes that wait for this.

    Begins by removing the word that an earlier start of this process has left. `FolderInUse` is no
    stop: another process does this one's work.
    """
    word = output.parent / f".{output.name}.{STOPPED}-{task.rank}"
    word.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if task.count > 1 and not isinstance(error, FolderInUse):
            write_whole(word, str(error) or type(error).__name__)
        raise
