"""Several processes search together: each has prompts of its own and writes files of its own.

Process r of n takes every n-th prompt, from the r-th on, and writes its rows to parts/r/. They meet
in the output folder alone, so torchrun, srun or an array of jobs can start them. The first waits
for the others and joins all rows, in the order of prompts and candidates. A search may be continued
with another number of processes: whoever has a prompt reads what any of them has written of it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sampling.errors import RunFailed
from sampling.tasks import Task
from sampling.whole_file import write_whole

PARTS, STOPPED = "parts", "stopped.txt"
POLL_S = 0.5
Item = TypeVar("Item")


def own_folder(output: Path, task: Task) -> Path:
    """Returns where this process writes its rows."""
    return output if task.count == 1 else output / PARTS / f"{task.rank:04d}"


def files_of(output: Path, name: str) -> list[Path]:
    """Returns the files of this name, of the whole search and of its parts."""
    paths = [output / name, *sorted((output / PARTS).glob(f"*/{name}"))]
    return [path for path in paths if path.is_file()]


def share_of(items: Sequence[Item], task: Task) -> list[Item]:
    """Returns what this process has to do."""
    return list(items[task.rank :: task.count])


def wait_until(is_done: Callable[[], bool], output: Path, since: float) -> None:
    """Waits for what other processes do; raises RunFailed where one has stopped with an error.

    since: time of this process's start; errors of earlier starts are not this one's.
    """
    while not is_done():
        for path in (output / PARTS).glob(f"*/{STOPPED}"):
            try:
                if path.stat().st_mtime >= since:
                    number, reason = path.parent.name, path.read_text(encoding="utf-8")
                    raise RunFailed(f"process {int(number)} of the search stopped: {reason}")
            except FileNotFoundError:
                continue
        time.sleep(POLL_S)


def tell_stop(output: Path, task: Task, reason: str) -> None:
    """Leaves word for the processes that wait for this one."""
    if task.count > 1:
        write_whole(own_folder(output, task) / STOPPED, reason)


def remove_parts(output: Path) -> None:
    """Removes the parts after their rows are joined."""
    shutil.rmtree(output / PARTS, ignore_errors=True)
