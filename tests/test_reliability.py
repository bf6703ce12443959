"""What docs/reliability.md is measured by: what counts as the same result, and what as a fault."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.reliability_faults import FAULTS, FIRST_SEED, build_library, kill
from tests.reliability_run import append, missing, read, table
from tests.reliability_trials import Bench, Row
from tests.reliability_verbs import contents, differences


def write_results(folder: Path, seconds: float, score: float = 0.5) -> Path:
    """Writes what a search and a training leave, with rows in the order of their seconds."""
    folder.mkdir()
    rows = [{"candidate": n, "score": score * n, "seconds": seconds} for n in range(3)]
    rows.sort(key=lambda row: row["candidate"] * seconds)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "candidates.jsonl").write_text(text)
    (folder / "ledger.json").write_text(json.dumps({"nfe": 12, "beside": {"seconds": seconds}}))
    header = "step,name,value\n"
    measured = f"1,train/loss,{score}\n1,train/images_per_s,{seconds}\n"
    (folder / "metrics.csv").write_text(header + measured)
    (folder / "environment.json").write_text(json.dumps({"started": seconds}))
    save_file({"a": torch.full((2,), score)}, folder / "model.safetensors", {"x": "1", "y": "2"})
    state = {"state_dict": {"a": torch.full((2,), score)}, "epoch": 1}
    torch.save(state, folder / "step_00000001.ckpt")
    return folder


def test_what_is_measured_makes_no_difference_and_what_is_computed_does(tmp_path: Path) -> None:
    first = contents(write_results(tmp_path / "first", 1.0))
    assert "environment.json" not in first
    again = write_results(tmp_path / "again", -2.0)
    assert not differences(contents(again), first)
    other = contents(write_results(tmp_path / "other", 1.0, score=0.75))
    names = ["candidates.jsonl", "metrics.csv", "model.safetensors", "step_00000001.ckpt"]
    assert differences(other, first) == [f"!{name}" for name in names]
    (again / "left.tmp").touch()
    (again / "ledger.json").unlink()
    assert differences(contents(again), first) == ["-ledger.json", "+left.tmp"]


def test_a_stopped_study_goes_on_with_the_trials_that_are_missing(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.csv", list[Row]()
    kinds = ["clock", "two jobs"]
    for seed in missing(rows, 2, 2 * len(FAULTS), kinds):
        fault = "none" if seed == 0 else "SIGKILL" if seed < FIRST_SEED else "clock"
        rows.append(Row(seed, fault, "train (own process)", "1 s", "-9 0", "", 1.0, "a, b"))
        append(path, rows[-1])
    assert read(path) == rows
    assert sorted(row.seed for row in rows if row.seed < FIRST_SEED) == [0, 1, 2]
    found = [list(FAULTS)[row.seed % len(FAULTS)] for row in rows if row.seed >= FIRST_SEED]
    assert found == kinds * 2
    assert not list(missing(read(path), 2, 2 * len(FAULTS), kinds))
    left = [row for row in rows if row.seed != FIRST_SEED + 5]
    assert list(missing(left, 1, 2 * len(FAULTS), kinds)) == [FIRST_SEED + 5]
    assert "| train | 2 | -9, then 0 | 0 | 1.0 | 1.0 |" in table(
        [row for row in rows if row.fault == "SIGKILL"], "verb", ["train"]
    )


PRELOADED = """
import ctypes, sys, time
faults, path = ctypes.CDLL(None), sys.argv[1]
before = time.time(), time.monotonic()
faults.faults_jump(ctypes.c_double(0), ctypes.c_double(-86400))
print(round((time.time() - before[0]) / 3600), time.monotonic() >= before[1])
faults.faults_stall(path.encode(), ctypes.c_long(2), ctypes.c_double(0.3))
for name in (path + "/in", path + "/in", "/dev/null"):
    with open(name, "ab", 0) as file:
        start = time.monotonic()
        file.write(b"1")
        print(time.monotonic() - start >= 0.3)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="faults.c is compiled by gcc")
def test_the_clock_jumps_and_storage_stalls_where_it_is_told_to(tmp_path: Path) -> None:
    library = build_library(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PRELOADED, str(tmp_path)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["-24", "True", "False", "True", "False"]
    assert run.stderr == "faults: stalled\n"


@pytest.mark.slow
def test_a_killed_command_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Three seeds of a hundred; with them the first of each fault that needs no root."""
    bench = Bench(tmp_path)
    rows = []
    for trial, seed in ((kill, 0), (kill, 1), (kill, 5), (FAULTS["two jobs"], FIRST_SEED)):
        bench.clear()
        rows.append(trial(bench, seed))
    assert not [row for row in rows if row.broken]
