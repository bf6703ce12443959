"""Looks at an installation and its machine: every probe in a process of its own, all at once.

A probe that crashes or does not answer in time costs its own row and no other: it is killed.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.scripts.doctor.disk import disk
from blackpoint.scripts.doctor.machine import packages, torch_and_step
from blackpoint.scripts.doctor.nodes import nodes, slurm
from blackpoint.scripts.doctor.row import Probe, Row, Status, one_line
from blackpoint.scripts.doctor.servers import hub, wandb


@dataclass
class DoctorConfig:
    """Looks at this installation and machine: exit status 1 if a row is red, else 0."""

    paths: list[PathText] = field(default_factory=lambda: ["."])
    """Folders that runs write and shards are read from: their room and speed are measured, with up
    to 64 MiB that are gone afterwards."""
    room_gb: float = 20.0
    """GB (10^9 bytes) that each of them should have free; less is yellow."""
    limit_s: float = 8.5
    """Seconds for everything; what has not answered by then is named."""
    json: bool = False
    """Print the rows as JSON."""

    def __post_init__(self) -> None:
        for name, value in (("room_gb", self.room_gb), ("limit_s", self.limit_s)):
            if not 0 < value < float("inf"):
                raise UserError(f"{name}={value}: must be a positive number")


def examine(config: DoctorConfig) -> list[Row]:
    """Returns all rows, in the order of the probes, within the limit."""
    disks = {f"disk {path}": partial(disk, path, config.room_gb) for path in config.paths}
    local: dict[str, Probe] = {"packages": packages, "torch": torch_and_step, **disks}
    others: dict[str, Probe] = {"wandb": wandb, "hub": hub, "SLURM": slurm, "several nodes": nodes}
    return answers(local | others, config.limit_s, optional=others)


def answers(
    probes: Mapping[str, Probe], limit_s: float, optional: Container[str] = ()
) -> list[Row]:
    """Runs all probes at once; returns their rows, at `limit_s` those that there are by then.

    What a probe was at when it crashed, failed or was given up has a row that says so: red, or
    yellow where the probe is optional and gave no answer.
    """
    context, deadline_s = multiprocessing.get_context("spawn"), time.monotonic() + limit_s
    rows: dict[str, list[Row]] = {name: [] for name in probes}
    at = {name: name for name in probes}
    waiting: dict[Connection, tuple[str, SpawnProcess]] = {}
    for name, probe in probes.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, name, probe), daemon=True)
        process.start()
        sender.close()
        waiting[receiver] = name, process
    while waiting and (left_s := deadline_s - time.monotonic()) > 0:
        for ready in wait(list(waiting), left_s):
            assert isinstance(ready, Connection)
            name, process = waiting[ready]
            try:
                found = ready.recv()
            except EOFError:  # it died
                del waiting[ready]
                process.join(max(0.0, deadline_s - time.monotonic()))
                if process.exitcode:
                    rows[name].append(
                        Row(at[name], "red", _death(process.exitcode), _more(at[name]))
                    )
                continue
            if isinstance(found, Row):
                rows[name].append(found)
            elif found is None:
                del waiting[ready]
            else:
                at[name] = found
    for name, process in waiting.values():
        process.kill()
        remedy = f"it hangs, or is slow: limit_s={6 * limit_s:g} gives it more time"
        status: Status = "yellow" if name in optional else "red"
        rows[name].append(Row(at[name], status, f"no answer within {limit_s:g} s", remedy))
    return [row for found in rows.values() for row in found]


def _send(sender: Connection, name: str, probe: Probe) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  warnings of libraries
    try:
        for found in probe():
            name = found if isinstance(found, str) else name
            sender.send(found)
    except Exception as error:
        sender.send(Row(name, "red", f"fails: {one_line(error)}", _more(name)))
    sender.send(None)  # ending may take long, of large libraries


def _death(status: int) -> str:
    """Says how a process ended; of a signal, its name."""
    if status < 0:
        return f"crashes with {signal.Signals(-status).name}"
    return f"ends with status {status}"


def _more(name: str) -> str:
    """Returns the remedy for a package that does not even start."""
    if name not in ("torch", "diffusers", "xformers", "bitsandbytes"):
        return ""
    return f"`python -c 'import {name}'` may show more; install a build for this machine"
