"""Runs the cells of a sweep, each verb in a process of its own, and keeps their outcomes.

run_dir/sweep.json            the cells: settings, folders, in order
run_dir/trainings/NAME/       a run directory of `blackpoint train`
run_dir/cells/NAME/cell.json  started, done or failed, by which settings, when, seconds of its
                              evaluation and search
run_dir/cells/NAME/log.txt    what the verbs printed
run_dir/cells/NAME/evaluation, search

A cell that is stopped or killed is continued by its verb, a finished one is not touched, a failed
one is tried again. Cells and trainings have locks: several sweeps, or the elements of an array, may
work in one folder, and who needs a training that another process makes waits for it. A verb holds
the lock of what it works on, and so keeps others away also where its sweep was killed alone.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blackpoint.data.files.dotted import nested
from blackpoint.data.files.errors import Resumable, UserError
from blackpoint.data.files.signals import RESUMABLE_STATUS, stop_if_asked
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.files.yaml_text import to_yaml
from blackpoint.sampling.evaluation.rows import REFERENCES
from blackpoint.sampling.report.results import CELL, FOLDERS, SWEEP, VERSION
from blackpoint.scripts.sweep.cells import Cell, Training, trainings_of
from blackpoint.scripts.sweep.config import Settings, SweepConfig
from blackpoint.scripts.sweep.identity import OWN_KEYS
from blackpoint.scripts.verb_process import verb_command
from blackpoint.train.records.run_lock import RunLock

LOG, LOCK = "log.txt", ".sweep.lock"
CACHE = "reference_cache"
POLL_S, GRACE_S = 1.0, 60.0
NUM_POLLS = 10
"""How often a cell whose lock is held is tried again, after all others: of a verb that was killed
with its sweep, worker processes may live for some seconds."""
LAUNCHERS = ("SLURM_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
"""Beginnings of variables by which a verb would take itself for one of several tasks."""
State = Literal["new", "started", "done", "failed", "stopped", "elsewhere"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell."""

    cell: Cell
    state: State
    reason: str = ""


class Runner:
    """Runs cells here; `stop` ends running ones, resumable."""

    def __init__(self, config: SweepConfig, num_processes: int) -> None:
        self._config = config
        self._num_processes = num_processes
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._trainings: dict[Path, threading.Lock] = {}
        self._untrained: dict[Path, int] = {}
        """Exit status of trainings that have failed in this start, so that each is tried once."""
        self._is_stopping = False

    def run(self, cells: list[Cell], tell: Any = lambda outcome: None) -> list[Outcome]:
        """Runs unfinished cells, trainings first; returns their outcomes in order."""
        todo = [cell for cell in cells if state_of(cell).state != "done"]
        outcomes = {cell.folder: Outcome(cell, "done") for cell in cells if cell not in todo}
        trainings = trainings_of(todo)
        self._trainings = {training.folder: threading.Lock() for training in trainings}
        with ThreadPoolExecutor(self._num_processes) as pool:
            for training in trainings:
                pool.submit(self._train_early, training)
            try:
                for polls_left in reversed(range(1 + NUM_POLLS)):
                    futures = [pool.submit(self._run_cell, cell) for cell in todo]
                    for future in _as_completed(futures):
                        outcome = future.result()
                        outcomes[outcome.cell.folder] = outcome
                        if outcome.state != "elsewhere" or not polls_left:
                            tell(outcome)
                    todo = [cell for cell in todo if outcomes[cell.folder].state == "elsewhere"]
                    if not todo or not polls_left:
                        break
                    time.sleep(POLL_S)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        return [outcomes[cell.folder] for cell in cells]

    def stop(self) -> None:
        """Ends the running verbs as a scheduler would, and waits for them."""
        with self._guard:
            self._is_stopping = True
            running = list(self._running)
        for process in running:
            process.terminate()
        until = time.monotonic() + GRACE_S
        for process in running:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _train_early(self, training: Training) -> None:
        """Trains before the cells; a cell that needs a failed training reports it."""
        if not is_trained(training):
            self._train(training)

    def _run_cell(self, cell: Cell) -> Outcome:
        lock = RunLock(cell.folder, LOCK)
        try:
            lock.acquire()
        except UserError as error:
            return Outcome(cell, "elsewhere", str(error))
        try:
            if state_of(cell).state == "done":  # by another process, meanwhile
                return Outcome(cell, "done")
            log = cell.folder / LOG
            before = read_cell(cell.folder)
            starts = [*before.get("starts", []), round(time.time(), 2)]
            seconds = before.get("seconds", 0.0)
            self._keep(cell, "started", {"seconds": seconds, "starts": starts})
            if cell.training is not None:
                status = self._train(cell.training)
                if status:
                    where = log_of(cell.training)
                    return self._ended(cell, status, f"its training failed: {where}", seconds)
            for section, settings in cell.sections.items():
                folder = cell.folder / FOLDERS[section]
                begun_s = time.monotonic()
                status = self._verb(section, settings, folder, log, lock)
                seconds += time.monotonic() - begun_s
                if status:
                    return self._ended(cell, status, last_line(log), seconds)
            return self._ended(cell, 0, skipped_in(cell), seconds)
        finally:
            lock.release()

    def _train(self, training: Training) -> int:
        """Trains, or waits for whoever does; returns the exit status."""
        with self._trainings.setdefault(training.folder, threading.Lock()):
            lock = RunLock(training.folder, LOCK)
            while not is_trained(training):
                if self._is_stopping:
                    return RESUMABLE_STATUS
                if training.folder in self._untrained:
                    return self._untrained[training.folder]
                try:
                    lock.acquire()
                except UserError:
                    time.sleep(POLL_S)
                    continue
                try:
                    if is_trained(training):
                        return 0
                    log = log_of(training)
                    status = self._verb("train", training.settings, training.folder, log, lock)
                    if status:
                        self._untrained[training.folder] = status
                    return status
                finally:
                    lock.release()
        return 0

    def _verb(self, verb: str, settings: Settings, folder: Path, log: Path, lock: RunLock) -> int:
        """Runs `blackpoint VERB` with these settings into its folder; returns its exit status.

        It holds the lock too.
        """
        path = log.with_name(f"{folder.name if verb == 'train' else verb}.yaml")
        keys = with_own_keys(verb, settings, folder, Path(self._config.run_dir))
        write_whole(path, to_yaml(nested(keys)))
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)
        } | self._threads()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file, self._guard:
            if self._is_stopping:
                return RESUMABLE_STATUS
            process = subprocess.Popen(
                verb_command(verb, str(path)),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(lock.fileno(),),
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def _threads(self) -> dict[str, str]:
        if self._num_processes == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {"OMP_NUM_THREADS": str(max(1, (count or 1) // self._num_processes))}

    def _ended(self, cell: Cell, status: int, reason: str, seconds: float) -> Outcome:
        """Keeps the outcome; a stopped cell has none yet."""
        if status == RESUMABLE_STATUS or self._is_stopping:
            return Outcome(cell, "stopped")
        if status < 0:
            name = signal.Signals(-status).name
            reason = f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        state: State = "failed" if status else "done"
        record = {
            "status": status,
            "reason": reason,
            "seconds": round(seconds, 2),
            "starts": read_cell(cell.folder)["starts"],
        }
        self._keep(cell, state, record)
        return Outcome(cell, state, reason)

    def _keep(self, cell: Cell, state: State, record: dict[str, Any]) -> None:
        is_whole = state != "done" or not record["reason"]  # else tried again by the next start
        digest = cell.digest if is_whole else ""
        content = {"name": cell.name, "digest": digest, "state": state, **record}
        write_whole(cell.folder / CELL, json.dumps(content, indent=1) + "\n")


def _as_completed(futures: Iterable["Future[Outcome]"]) -> Iterator["Future[Outcome]"]:
    """Yields futures as they end; waiting is a safe point."""
    pending = set(futures)
    while pending:
        stop_if_asked()
        done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
        yield from done


def with_own_keys(verb: str, settings: Settings, folder: Path, run_dir: Path) -> Settings:
    """Returns a verb's keys with the sweep's: its folder, and the references' features, which all
    cells share."""
    keys = settings | {OWN_KEYS[verb]: str(folder)}
    if verb == "evaluate" and settings.get("sets.reference"):
        keys.setdefault(CACHE, str(run_dir / REFERENCES))
    return keys


def state_of(cell: Cell) -> Outcome:
    """Returns a cell's state from an earlier start; started: stopped, or under way."""
    content = read_cell(cell.folder)
    if content.get("state") == "done" and content.get("digest") == cell.digest:
        return Outcome(cell, "done")
    if content.get("state") in ("started", "failed") and content.get("digest") == cell.digest:
        return Outcome(cell, content["state"], content.get("reason", ""))
    return Outcome(cell, "new")


def read_cell(folder: Path) -> dict[str, Any]:
    """Reads cell.json; nothing where there is none, or none that can be read."""
    try:
        return json.loads((folder / CELL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def log_of(training: Training) -> Path:
    """Returns where a training's words go, beside its folder; a name may hold dots."""
    return training.folder.with_name(f"{training.folder.name}.log")


def is_trained(training: Training) -> bool:
    """Whether the training's export is there, which is written last."""
    return (training.folder / "export" / "model_index.json").is_file()


def write_sweep(config: SweepConfig, cells: Iterable[Cell]) -> None:
    """Writes sweep.json, by which a report finds the cells of the grid as it is now.

    A cell whose cell.json has another digest was made by other settings; with "" there, a metric is
    missing.
    """
    path = Path(config.run_dir) / SWEEP
    rows = [
        {
            "name": cell.name,
            "arm": cell.arm,
            "varied": cell.varied,
            "folder": str(cell.folder.relative_to(config.run_dir)),
            "digest": cell.digest,
            "training": cell.training.name if cell.training else None,
            "train": cell.training.settings if cell.training else {},
            **cell.sections,
        }
        for cell in cells
    ]
    content = {"version": VERSION, "baseline": config.baseline, "cells": rows}
    write_whole(path, json.dumps(content, indent=1, default=str) + "\n")


def skipped_in(cell: Cell) -> str:
    """Names the metrics that an evaluation could not measure here; "" where it had all."""
    path = cell.folder / FOLDERS["evaluate"] / "metrics.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = ", ".join(content.get("skipped", {}))
    return f"without {names}, which could not be loaded" if names else ""


def last_line(log: Path) -> str:
    """Returns the last line of a log that says something."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it printed nothing'} ({log})"


def raise_stopped(outcomes: Iterable[Outcome]) -> None:
    """Raises Resumable where a cell was stopped."""
    stopped = [outcome.cell.name for outcome in outcomes if outcome.state == "stopped"]
    if stopped:
        raise Resumable(f"stopped in {', '.join(stopped)}; the same command continues")
