"""Runs a command and measures it: wall time, and the most memory that it held.

Two figures of memory, in bytes. Peak RSS is the high-water mark of the largest process: it counts
pages of mapped files, which the system can drop. Peak anonymous memory is what it cannot drop, of
the process and its descendants together. Linux tells both, ten times per second; elsewhere the
first is that of getrusage, which also knows the caller's own size, and the second is 0.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Measured:
    """One finished command; `status` is negative where a signal ended it."""

    status: int
    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def run_measured(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    on_look: Callable[[int], None] | None = None,
) -> Measured:
    """Runs `command` to its end, its output going to `log`; `on_look` is told its process id.

    An interrupted caller ends the command.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started_s, peak, anonymous = time.perf_counter(), 0, 0
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                looks = [memory_of(member) for member in family(process.pid)]
                peak = max(peak, *(high for high, _ in looks))
                anonymous = max(anonymous, sum(held for _, held in looks))
                if on_look is not None:
                    on_look(process.pid)
                time.sleep(LOOK_EVERY_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - started_s
    return Measured(process.returncode, seconds, peak or usage.ru_maxrss * unit, anonymous)


def family(pid: int) -> list[int]:
    """Lists a process and its descendants; those that have ended are left out."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return [pid]
    return [pid, *(member for child in text.split() for member in family(int(child)))]


def memory_of(pid: int) -> tuple[int, int]:
    """Returns a process's highest RSS so far and its anonymous memory now; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return int(kilobytes.get("VmHWM", 0)) * 1024, int(kilobytes.get("RssAnon", 0)) * 1024
