"""How a sweep runs its cells: whose lock keeps whom away, what it writes; verbs are stand-ins."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.files.errors import UserError
from blackpoint.scripts.cli import main
from blackpoint.scripts.sweep import runner as sweep_runner
from blackpoint.scripts.sweep.runner import LOCK, read_cell
from blackpoint.train.records.run_lock import RunLock
from tests.tiny_sweep import EVALUATE, cells, sweep
from tests.waiting import wait_for

MODEL = {**EVALUATE, "checkpoint": "model"}
SLEEPS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(3600)"


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """The verbs that were run, each of which did nothing, well."""
    found: list[tuple[str, ...]] = []

    def command(*arguments: str) -> list[str]:
        found.append(arguments)
        return ["true"]

    monkeypatch.setattr(sweep_runner, "verb_command", command)
    monkeypatch.setattr(sweep_runner, "POLL_S", 0.05)
    yield found


def clock(**changes: Any) -> types.SimpleNamespace:
    """Returns the module `time` with some of it changed."""
    return types.SimpleNamespace(**{**vars(time), **changes})


def is_held(folder: Path) -> bool:
    lock = RunLock(folder, LOCK)
    try:
        lock.acquire()
    except UserError:
        return True
    lock.release()
    return False


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_a_verb_keeps_its_lock_when_its_sweep_is_killed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A second start would run a second verb in the same folder."""
    settings: dict[str, Any] = {"evaluate": MODEL}
    if verb == "train":
        settings = {"evaluate": {}, "train": {"checkpoint": "model", "data.shards": "shards"}}
    path, pid = sweep(tmp_path, **settings), tmp_path / "pid"
    [cell] = cells(tmp_path, **settings)
    folder = cell.training.folder if cell.training else cell.folder
    command = [sys.executable, "-c", SLEEPS, str(pid)]
    monkeypatch.setattr(sweep_runner, "verb_command", lambda *_: command)
    start = multiprocessing.get_context("fork").Process(target=main, args=(["sweep", str(path)],))
    start.start()
    wait_for(lambda: pid.is_file() and pid.read_text(), start.is_alive)
    start.kill()
    start.join()
    assert is_held(folder)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    wait_for(lambda: not is_held(folder))


def test_a_cell_that_is_being_run_elsewhere_is_left_alone(
    tmp_path: Path, verbs: list[Any], capsys: Any
) -> None:
    grid = {"evaluate.seed": [0, 1]}
    path = sweep(tmp_path, evaluate=MODEL, grid=grid)
    held, free = cells(tmp_path, evaluate=MODEL, grid=grid)
    lock = RunLock(held.folder, LOCK)
    lock.acquire()
    try:
        assert main(["sweep", str(path)]) == 0
    finally:
        lock.release()
    assert "1 elsewhere, 1 done" in capsys.readouterr().out
    assert len(verbs) == 1 and str(free.folder) in verbs[0][1]
    with pytest.raises(UserError, match="in use by another process"):
        lock.acquire()
        RunLock(held.folder, LOCK).acquire()


def test_a_cell_that_is_let_go_meanwhile_is_run(
    tmp_path: Path, verbs: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [cell] = cells(tmp_path, evaluate=MODEL)
    lock = RunLock(cell.folder, LOCK)
    lock.acquire()
    monkeypatch.setattr(sweep_runner, "time", clock(sleep=lambda _: lock.release()))
    assert main(["sweep", str(sweep(tmp_path, evaluate=MODEL))]) == 0
    out = capsys.readouterr().out
    assert len(verbs) == 1 and read_cell(cell.folder)["state"] == "done"
    assert "1 done" in out and "elsewhere" not in out


def test_the_file_of_the_sweep_holds_every_cell_with_its_digest(
    tmp_path: Path, verbs: list[Any]
) -> None:
    """Also where a first start runs some of them; the report shows the others as not run."""
    grid = {"evaluate.seed": [0, 1]}
    found = cells(tmp_path, evaluate=MODEL, grid=grid)
    assert main(["sweep", str(sweep(tmp_path, evaluate=MODEL, grid=grid)), "only=[seed-1]"]) == 0
    assert len(verbs) == 1
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["cells"]
    assert [row["digest"] for row in rows] == [cell.digest for cell in found]
    assert [row["name"] for row in rows] == ["seed-0", "seed-1"]
    assert read_cell(found[1].folder)["digest"] == found[1].digest


def test_seconds_of_a_cell_are_those_of_its_own_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "train": {"checkpoint": "model", "data.shards": "shards"},
        "grid": {"evaluate.seed": [0, 1]},
        "num_processes": 2,
    }
    found = cells(tmp_path, **settings)
    training = found[0].training
    assert training is not None and training == found[1].training
    index = training.folder / "export" / "model_index.json"
    code = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); "
    code += "path.parent.mkdir(parents=True); path.touch()"
    train = [sys.executable, "-c", code, str(index)]
    monkeypatch.setattr(
        sweep_runner, "verb_command", lambda verb, _: train if verb == "train" else ["true"]
    )
    trained = clock(monotonic=lambda: 1000.0 if index.exists() else 0.0)
    monkeypatch.setattr(sweep_runner, "time", trained)
    assert main(["sweep", str(sweep(tmp_path, **settings))]) == 0
    assert all(read_cell(cell.folder)["seconds"] == 0.0 for cell in found)


def test_cells_share_what_is_measured_of_the_references(tmp_path: Path) -> None:
    def keys(verb: str, settings: dict[str, Any]) -> dict[str, Any]:
        return sweep_runner.with_own_keys(verb, settings, Path("cell"), tmp_path)

    compared = {"sets.reference": "pictures"}
    assert keys("evaluate", compared)["reference_cache"] == str(tmp_path / "references")
    chosen = compared | {"reference_cache": "mine"}
    assert keys("evaluate", chosen) == chosen | {"output": "cell"}
    for settings in ({}, {"sets.reference": None}):
        assert "reference_cache" not in keys("evaluate", settings)
    assert keys("train", {}) == {"run_dir": "cell"}
