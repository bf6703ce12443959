"""One trial of a command: its starts, how they ended, and what an undisturbed one leaves."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blackpoint.scripts.verb_process import verb_command
from tests.interrupted_verb import interrupt_at_change
from tests.reliability_verbs import VERBS, Assets, contents, differences
from tests.warm_verb import WarmVerb

LIMIT_S = 600.0
"""A start that takes longer hangs: the longest fault stalls for 60 s and is met eight times."""
TRAININGS = ("train", "train LoRA")
FORKED = tuple(name for name in VERBS if name != "sweep")
KILLED = -int(signal.SIGKILL)


@dataclass
class Row:
    """A trial."""

    seed: int
    fault: str
    verb: str
    moment: str
    """What was done, and when."""
    statuses: str
    """Exit status of each start, in order; `hung` where it did not end."""
    broken: str
    """Laws that were broken."""
    lost_s: float
    """Seconds of all starts, less those of an undisturbed one."""
    said: str
    """Last line of the disturbed start."""


class Process:
    """A start of a command, in a process of its own: forked, or started as a shell does."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        is_forked: bool = True,
        before: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
        prefix: list[str] | None = None,
    ) -> None:
        self.log, self.begun_s = log, time.monotonic()
        log.unlink(missing_ok=True)
        self.process: Any
        if is_forked:
            self.process = WarmVerb(
                *arguments, before=before, environment=environment, log=str(log)
            )
        else:
            with log.open("w") as file:
                self.process = subprocess.Popen(
                    [*(prefix or []), *verb_command(*arguments)],
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    env=os.environ | (environment or {}),
                )
        self.pid: int = self.process.pid

    def kill(self, is_group: bool = False) -> None:
        """Sends SIGKILL, as a lack of memory does, or to the group, as the end of a container."""
        send = os.killpg if is_group else os.kill
        with contextlib.suppress(ProcessLookupError):
            send(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        status: int | None = self.process.poll()
        return status

    def wait(self, limit_s: float = LIMIT_S) -> int | None:
        """Returns the exit status, or None where it hangs and had to be killed."""
        try:
            status: int | None = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill(is_group=True)
            self.process.wait(60)
            return None
        return status

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Trial:
    """One trial: what is run, and what has become of its starts."""

    bench: "Bench"
    name: str
    rng: random.Random
    values: Mapping[str, Any] = field(default_factory=dict)
    """More settings, of a training."""
    is_forked: bool = True
    expected: "Whole | None" = None
    """What is left undisturbed, where the same arguments without fault do not tell."""
    statuses: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""
    broken: list[str] = field(default_factory=list)

    @property
    def place(self) -> Path:
        return self.bench.place

    @property
    def out(self) -> Path:
        return self.place / "out"

    def arguments(self) -> list[str]:
        return VERBS[self.name].arguments(self.bench.assets, self.out, **self.values)

    def whole(self) -> "Whole":
        if self.expected is None:
            self.expected = self.bench.whole(self)
        return self.expected

    def start(self, **options: Any) -> Process:
        number = len(list(self.bench.work.glob("*.log")))
        log = self.bench.work / f"{number}.log"
        return Process(self.arguments(), log, self.is_forked, **options)

    def end(self, process: Process, limit_s: float = LIMIT_S, allowed: tuple[int, ...] = ()) -> int:
        """Waits for a start and notes how it ended; -1 where it hung."""
        status = process.wait(limit_s)
        self.seconds += time.monotonic() - process.begun_s
        output = process.output()
        self.statuses.append(status)
        if status is None:
            self.broken.append("hung")
        elif allowed and status not in allowed:
            self.broken.append(f"status {status}, not one of {allowed}")
        if "Traceback (most recent call last)" in output:
            self.broken.append(f"traceback {output.split('Traceback')[-1][-500:]}")
        if len(self.statuses) == 1:
            self.said = last_line(output)
        return -1 if status is None else status

    def again(self) -> None:
        """Runs the same command, which must end well and with the same results."""
        self.end(self.start(), allowed=(0,))
        self.compare()

    def settle(self) -> None:
        """Compares the results, after another start where the command has failed."""
        if self.statuses[-1] == 0:
            self.compare()
        else:
            self.again()

    def compare(self) -> None:
        if different := differences(contents(self.place), self.whole().files):
            self.broken.append(f"differs: {' '.join(different)[:400]}")

    def row(self, seed: int, fault: str, moment: str) -> Row:
        statuses = " ".join("hung" if status is None else str(status) for status in self.statuses)
        broken = "; ".join(self.broken).encode("unicode_escape").decode()
        lost_s = round(self.seconds - self.whole().seconds, 1)
        name = self.name if self.is_forked else f"{self.name} (own process)"
        return Row(seed, fault, name, moment, statuses, broken, lost_s, self.said)


@dataclass
class Whole:
    """What an undisturbed start leaves, in what time, with how many changes where a kill aims."""

    files: dict[str, str]
    seconds: float
    num_changes: int
    num_bytes: int


class Bench:
    """The folder where trials take their turns."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.place = work, work / "place"
        self.assets = Assets.make(work / "assets")
        self._wholes: dict[tuple[str, str, bool], Whole] = {}
        self.clear()
        Process(["--version"], work / "0.log").wait()  # the server of forks imports

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for path in self.work.glob("*.log"):
            path.unlink()

    def whole(self, trial: Trial) -> Whole:
        """Runs the trial's command undisturbed, once; where it stands in the way, aside."""
        key = (trial.name, repr(trial.values), trial.is_forked)
        if key not in self._wholes:
            aside = self.work / "aside"
            shutil.rmtree(aside, ignore_errors=True)
            self.place.rename(aside)
            self.place.mkdir()
            counter = self.work / "counter"
            counter.write_bytes(b"")
            count = partial(interrupt_at_change, 9, 10**9, str(counter), self.aim(trial))
            start: dict[str, Any] = {"before": count} if trial.is_forked else {}
            process = trial.start(**start)
            assert process.wait() == 0, process.output()
            seconds = time.monotonic() - process.begun_s
            num_bytes = sum(p.stat().st_size for p in self.place.rglob("*") if p.is_file())
            found = contents(self.place)
            self._wholes[key] = Whole(found, seconds, counter.stat().st_size, num_bytes)
            shutil.rmtree(self.place)
            aside.rename(self.place)
        return self._wholes[key]

    def aim(self, trial: Trial) -> str:
        """Returns the folder whose changes an aimed kill counts."""
        aim = VERBS[trial.name].aim
        return str(self.place / aim) if aim else f"{self.place}/"


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def last_line(output: str) -> str:
    lines = output.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("<frozen runpy>")]
    return (lines or [""])[-1].encode("unicode_escape").decode()[:200]


def drawn_verb(rng: random.Random, names: tuple[str, ...] = tuple(VERBS)) -> str:
    return rng.choices(names, [VERBS[name].weight for name in names])[0]
