"""`python -m blackpoint.scripts.studies.sweep_study`: a sweep whose cells are killed at random,
beside one left alone.

Submits slurm/sweep.sbatch twice to the SLURM at hand, into two folders: one array is left alone, of
the other random elements are killed (SIGKILL) while they run, and then it is submitted again until
all cells are done. Both must have the same table, and no finished cell may have been started again.
Without a cluster: `python -m tests.slurm_cluster python -m blackpoint.scripts.studies.sweep_study`.
"""

import json
import random
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.results import CELL, Cell, read_results
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script
from blackpoint.scripts.sweep.cells import cells_of
from blackpoint.scripts.sweep.config import SweepConfig
from blackpoint.scripts.sweep.runner import read_cell
from blackpoint.scripts.verb_process import verb_command


@dataclass
class SweepStudyConfig:
    """Which sweep, and how it is disturbed."""

    config: str = "configs/sampling_sweep.yaml"
    """The sweep."""
    options: str = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=120"
    """Options of sbatch; partition and account go here."""
    at_once: int = 4
    """Elements that run at the same time."""
    work: str = "runs/sweep_study"
    """Folder of the two sweeps, undisturbed/ and disturbed/."""
    output: str = "docs/sweep_study.json"
    """What came out."""
    num_kills: int = 16
    """Elements that are killed, in all."""
    seed: int = 0
    """Decides which elements are killed, and when."""
    timeout_s: float = 7200.0
    """An array that takes longer has failed."""


def study(config: SweepStudyConfig) -> dict[str, Any]:
    """Runs both sweeps and returns what came out; raises RunFailed where a cell is not done."""
    quiet, disturbed = (Path(config.work) / name for name in ("undisturbed", "disturbed"))
    started_s = time.time()
    cells = cells_of(load(SweepConfig, [config.config, f"run_dir={quiet}"]))
    run_array(config, quiet, len(cells))
    quiet_s = time.time() - started_s
    rng = random.Random(config.seed)
    killed: list[str] = []
    submissions, again = 0, 0
    while not (submissions and all_done(config, disturbed)):
        before = finished(disturbed)
        left = config.num_kills - len(killed) if submissions == 0 else 0
        killed += run_array(config, disturbed, len(cells), rng, left)
        submissions += 1
        again += sum(finished(disturbed).get(path) != content for path, content in before.items())
        if submissions > 5:
            raise RunFailed(f"{config.work}: cells fail without being killed; look at their logs")
    tables = [table_of(folder) for folder in (quiet, disturbed)]
    page = quiet / "report.html"
    subprocess.run(
        verb_command("report", f"run_dir={quiet}"),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    result = {
        "config": config.config,
        "cells": len(cells),
        "killed": len(killed),
        "submissions": submissions,
        "finished_cells_run_again": again,
        "starts": sum(len(json.loads(c)["starts"]) for c in finished(disturbed).values()),
        "same_table": tables[0] == tables[1],
        "undisturbed_s": round(quiet_s),
        "report_megabytes": round(page.stat().st_size / 1e6, 2),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
    }
    write_whole(Path(config.output), json.dumps(result, indent=1) + "\n")
    return result


def run_array(
    config: SweepStudyConfig,
    run_dir: Path,
    num_cells: int,
    rng: random.Random | None = None,
    num_kills: int = 0,
) -> list[str]:
    """Submits the sweep, kills elements while it runs, waits for its end; returns the killed."""
    array = f"--array=0-{num_cells - 1}%{config.at_once}"
    arguments = ["--parsable", *shlex.split(config.options), array, "slurm/sweep.sbatch"]
    job = run("sbatch", *arguments, config.config, f"run_dir={run_dir}").strip()
    killed: list[str] = []
    deadline_s = time.monotonic() + config.timeout_s
    while elements := running_elements(job):
        if time.monotonic() > deadline_s:
            raise RunFailed(f"array {job} has not ended after {config.timeout_s:.0f} s")
        active = [element for element in elements if element not in killed and "[" not in element]
        if rng is not None and len(killed) < num_kills and active and rng.random() < 0.3:
            chosen = rng.choice(active)
            run("scancel", "--signal=KILL", "--full", chosen, check=False)
            killed.append(chosen)
        time.sleep(1.0)
    return killed


def running_elements(job: str) -> list[str]:
    """Lists the elements of an array that are not over, as 17_3; those that wait as 17_[4-8]."""
    text = run("squeue", "-h", "-j", job, "-o", "%i %T", check=False)
    rows = [line.split() for line in text.splitlines()]
    return [name if state == "RUNNING" else f"{name}[" for name, state in rows]


def all_done(config: SweepStudyConfig, run_dir: Path) -> bool:
    """Whether every cell of the sweep is done."""
    cells = cells_of(load(SweepConfig, [config.config, f"run_dir={run_dir}"]))
    return all(read_cell(cell.folder).get("state") == "done" for cell in cells)


def finished(run_dir: Path) -> dict[Path, str]:
    """Returns the records of finished cells, by their path."""
    texts = {path: path.read_text(encoding="utf-8") for path in run_dir.glob(f"cells/*/{CELL}")}
    return {path: text for path, text in texts.items() if json.loads(text)["state"] == "done"}


def table_of(run_dir: Path) -> dict[str, Any]:
    """Returns every number of a sweep but seconds and memory, by cell and metric."""

    def numbers(cell: Cell) -> dict[str, Any]:
        return {name: value.estimate for name, value in cell.values.items()} | {"NFE": cell.nfe}

    return {cell.name: numbers(cell) for cell in read_results(run_dir).cells}


def run(*command: str, check: bool = True) -> str:
    """Runs a client command of SLURM and returns what it printed."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if check and answer.returncode:
        raise RunFailed(f"{shlex.join(command)}: {answer.stderr.strip()}")
    return re.sub(r"\x1b\[[0-9;]*m", "", answer.stdout)


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status."""
    return run_script("sweep_study", lambda: print(study(load(SweepStudyConfig, argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
