"""Whether a job that ended goes back to SLURM's queue, and how.

A stop that a signal asked for or that a server's silence forced, and a task that was killed, go
back; a failure of the run's own does not, for it would come again. A job that makes no steps
between its starts ends, too.
"""

import contextlib
import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from blackpoint.data.files.signals import RESUMABLE_STATUS
from blackpoint.scripts.cluster.slurm_allocation import Allocation, scontrol

MAX_RESTARTS = 200
MAX_FRUITLESS = 3
"""Starts in a row that may be stopped before their first step, as in a burst of preemptions."""
# 128 + SIGUSR1 and SIGTERM: the signal came before Python could answer it.
STOPPED = (RESUMABLE_STATUS, 128 + 10, 128 + 15)
KILLED = 128
RECORD = "starts.jsonl"


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of run_dir/starts.jsonl: one for each start of a job that ended here.

    A line that a full disk has cut off is left out.
    """
    path = run_dir / RECORD
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def record_start(run_dir: Path, row: dict[str, Any]) -> None:
    """Appends a row, with the time; a full disk must not keep the job from the queue."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    path = run_dir / RECORD
    with contextlib.suppress(OSError):
        before = path.read_bytes() if path.exists() else b""
        end_of_last = "\n" if before and not before.endswith(b"\n") else ""
        with path.open("a", encoding="utf-8") as file:
            file.write(end_of_last + json.dumps({"time": now} | row) + "\n")


def reason_to_end(
    status: int, failed: bool, restart: int, rows: list[dict[str, Any]]
) -> str | None:
    """Returns why a job must not be requeued, or None if it may be.

    `status` is srun's, `failed` says that a task failed by itself, and `rows` are the starts of the
    run so far, this one last.
    """
    stopped = status in STOPPED
    if failed or not (stopped or status > KILLED):
        return "the run failed by itself and would fail again"
    if restart >= MAX_RESTARTS:
        return f"it was requeued {restart} times; submit it again to go on"
    fruitless = 0
    for row in reversed(rows):
        if row["step_after"] > row["step_before"]:
            break
        fruitless += 1
    if fruitless and not stopped:
        return "a task was killed, and no step has been saved since the start"
    if fruitless >= MAX_FRUITLESS:
        return f"no step has been saved in the last {fruitless} starts"
    return None


def requeue(allocation: Allocation) -> str:
    """Sends the job back to the queue, unless SLURM is ending it by itself; says what it did."""
    try:
        state = re.search(r"JobState=(\S+)", scontrol("show", "job", allocation.element))
        if state is None or state[1] != "RUNNING":
            shown = state[1] if state else "unknown"
            return f"SLURM is ending the job itself (state {shown}): left to SLURM"
        scontrol("requeue", allocation.element)
    except FileNotFoundError:
        return "scontrol is not on this node: not requeued; submit the same command again"
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"scontrol requeue failed ({said.strip()}): not requeued; submit the same command"
    return "requeued"
