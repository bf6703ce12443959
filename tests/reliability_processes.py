"""Other processes of a command: killed, gone with their node, or started a second time."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blackpoint.data.files.signals import is_alive
from tests.reliability_trials import (
    FORKED,
    KILLED,
    TRAININGS,
    Bench,
    Process,
    Row,
    Trial,
    drawn_verb,
    last_line,
    run,
)

PATIENCE_S = 2400.0
"""For what waits for a lost node: torch waits for half an hour."""
POLL_S = 0.005


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def two_jobs(bench: Bench, seed: int) -> Row:
    """The same command a second time, while the first runs."""
    rng = random.Random(seed)
    trial = Trial(bench, drawn_verb(rng, FORKED), rng)
    after_s = rng.uniform(0, trial.whole().seconds)
    first = trial.start()
    wait_until(lambda: first.poll() is not None, after_s)
    second = trial.start()
    statuses = [trial.end(first, allowed=(0, 2))]
    seconds = trial.seconds
    statuses.append(trial.end(second, allowed=(0, 2)))
    trial.seconds = seconds  # of the first alone: both ran at once
    trial.said = last_line(second.output())
    if 0 not in statuses:
        trial.broken.append("neither has done it")
    trial.compare()
    return trial.row(seed, "two jobs", f"second after {after_s:.2f} s")


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    until_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(POLL_S)
    return True


def worker(bench: Bench, seed: int) -> Row:
    """One worker process of several is killed, as for lack of memory."""
    rng = random.Random(seed)
    name = rng.choice([*TRAININGS, *TRAININGS, "data pack", "data encode"])
    values: dict[str, Any] = {"data.num_workers": 2} if name in TRAININGS else {}
    values = {"num_processes": 2} if name == "data encode" else values
    trial = Trial(bench, name, rng, values)
    after_s = rng.uniform(0, 0.7 * trial.whole().seconds)
    process = trial.start()
    wait_until(lambda: process.poll() is not None, after_s)
    wait_until(lambda: process.poll() is not None or bool(children(process.pid)), 60)
    number, found = -1, children(process.pid)
    if found:
        number = rng.randrange(len(found))
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[number], signal.SIGKILL)
    trial.end(process, allowed=(0, 1, 75))
    trial.settle()
    return trial.row(seed, "worker killed", f"{number + 1} of {len(found)} after {after_s:.2f} s")


def rank(bench: Bench, seed: int) -> Row:
    """One of two training processes is killed, as for lack of memory."""
    rng = random.Random(seed)
    trial = Trial(bench, rng.choice(TRAININGS), rng, {"trainer.devices": 2}, is_forked=False)
    after_s = rng.uniform(0, trial.whole().seconds)
    process = trial.start()
    wait_until(lambda: process.poll() is not None, after_s)
    which = rng.choice(["first", "second"])
    found = [pid for pid in children(process.pid) if "train" in command_of(pid)]
    if which == "second" and not found:
        which = "first"
    with contextlib.suppress(ProcessLookupError):
        os.kill(found[0] if which == "second" else process.pid, signal.SIGKILL)
    trial.end(process, allowed=(0, 1, 75, KILLED))
    wait_until(lambda: not any(map(is_alive, found)), 120)
    if any(map(is_alive, found)):
        trial.broken.append("the other process hangs")
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    trial.again()
    return trial.row(seed, "rank killed", f"{which} after {after_s:.2f} s")


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Two networks, 10.77.0.1 and 10.77.0.2, with one wire between them."""
    names = (f"bp1-{os.getpid()}", f"bp2-{os.getpid()}")
    try:
        for name in names:
            run("ip", "netns", "add", name)
        first = ("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        run("ip", "-n", names[0], *first)
        for number, name in enumerate(names, start=1):
            run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire")
            run("ip", "-n", name, "link", "set", "wire", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def lost_node(bench: Bench, seed: int) -> Row:
    """A node is gone from one moment to the next: its wire is cut, and its process killed."""
    rng = random.Random(seed)
    values = {"trainer.max_steps": 200, "trainer.checkpoint_every_steps": 20}
    values |= {"trainer.validate_every_steps": 0}
    plain = Trial(bench, "train", rng, values | {"trainer.devices": 2}, is_forked=False).whole()
    trial = Trial(bench, "train", rng, values | {"trainer.num_nodes": 2}, False, plain)
    step, metrics = rng.randint(30, 150), trial.out / "metrics.csv"

    def last_step() -> int:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0

    def start(names: tuple[str, str]) -> list[Process]:
        common = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
        common |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "wire"}
        common |= {"TORCHELASTIC_RUN_ID": str(seed)}
        return [
            trial.start(
                environment=common | {"RANK": str(number), "NODE_RANK": str(number)},
                prefix=["ip", "netns", "exec", name],
            )
            for number, name in enumerate(names)
        ]

    with two_nodes() as names:
        first, second = start(names)
        wait_until(lambda: last_step() >= step or first.poll() is not None, PATIENCE_S)
        run("ip", "-n", names[1], "link", "set", "wire", "down")
        second.kill(is_group=True)
        begun_s = time.monotonic()
        trial.end(first, PATIENCE_S, allowed=(1, 75))
        waited_s = time.monotonic() - begun_s
        second.wait()
        run("ip", "-n", names[1], "link", "set", "wire", "up")
        again = start(names)
        for process in again:
            trial.end(process, allowed=(0,))
        trial.compare()
    return trial.row(seed, "lost node", f"at step {step}; the other waited {waited_s:.0f} s")
