"""`blackpoint ARGUMENTS`, to which a signal comes at its n-th change of a folder.

    INTERRUPTED="SIGNAL N COUNTER FOLDER" python tests/interrupted_verb.py ARGUMENTS

A test that looks on and sends the signal itself comes too late on a busy machine. Changes are new
folders, renames and removals below FOLDER, and files there that are opened to be written; those of
worker processes count too, for what is spawned runs this file again. SIGKILL goes to the first
process alone, as from the system; others to all, as from a terminal or a scheduler.
"""

import fcntl
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def interrupted(
    number: int, count: int, folder: Path, arguments: Sequence[str], is_warm: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a command and interrupts it at its `count`-th change below `folder`.

    `is_warm`: in a process that has everything imported; changes by processes that it spawns don't
    count.
    """
    with tempfile.NamedTemporaryFile() as counter:
        if is_warm:
            from tests.warm_verb import WarmVerb  # not where this file is what is run

            given = (int(number), count, counter.name, str(folder))
            process = WarmVerb(*arguments, before=functools.partial(interrupt_at_change, *given))
            output, error = process.communicate()
            assert process.returncode is not None
            return subprocess.CompletedProcess(arguments, process.returncode, output, error)
        return subprocess.run(
            [sys.executable, __file__, *arguments],
            cwd=ROOT,
            env=os.environ | {"INTERRUPTED": f"{int(number)} {count} {counter.name} {folder}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            check=False,
        )


def interrupt_at_change(
    number: int, count: int, counter: str, folder: str, delay_s: float = 0.0
) -> None:
    """Sends the signal to the processes of this one's group, just before the change is made.

    The file `counter` gets a byte for each change. `delay_s`: so long after that moment, while the
    change goes on.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in CHANGES
        if event == "open" and isinstance(arguments[2], int):
            is_change = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_change and str(arguments[0]).startswith(folder) and _added(counter) == count:
            if not delay_s:
                _send(number)
            elif not os.fork():
                try:
                    time.sleep(delay_s)
                    _send(number)
                finally:
                    os._exit(0)

    sys.addaudithook(hook)


def _added(path: str) -> int:
    """Adds one to what all processes count, and returns it."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, b".")
        return os.fstat(file).st_size
    finally:
        os.close(file)


def _send(number: int) -> None:
    if number == signal.SIGKILL:
        os.kill(os.getpgrp(), number)
    else:
        os.killpg(os.getpgrp(), number)


if "INTERRUPTED" in os.environ:  # here, and in every process that is spawned
    _number, _count, *_paths = os.environ["INTERRUPTED"].split(" ", 3)
    interrupt_at_change(int(_number), int(_count), *_paths)

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from blackpoint.scripts.cli import entry

    entry()
