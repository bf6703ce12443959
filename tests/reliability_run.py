"""Breaks commands on purpose and looks whether the same command, started again, ends as if nothing
had been:

    python -m tests.reliability_run number_of_kills=100 faults=66 number_of_requeues=100

A trial is a function of its seed: which verb, which fault, at what moment. Its row is kept as it is
made, and the same command goes on; `kinds=clock,two jobs` runs these faults alone. Most starts
are forks of a process that has everything imported, some are processes of their own. Needs root for
disks and networks, gcc for stalls and clocks, and SLURM for requeues.
"""

import csv
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median

from blackpoint.scripts.measurements import requeue_study
from blackpoint.scripts.measurements.requeue_study import RequeueStudyConfig
from tests.reliability_faults import FAULTS, FIRST_SEED, build_library, kill
from tests.reliability_trials import LIMIT_S, Bench, Process, Row, last_line
from tests.reliability_verbs import VERBS, contents, differences
from tests.slurm_cluster import Cluster

WORK = "runs/reliability"


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="ascii", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {each.name: {"seed": int, "lost_s": float}.get(each.name, str) for each in fields(Row)}
    return [Row(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]


def append(path: Path, row: Row) -> None:
    print(row, file=sys.stderr, flush=True)
    is_new = not path.exists()
    with path.open("a", encoding="ascii", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def table(rows: list[Row], of: str, names: list[str]) -> str:
    """Returns a Markdown table: for each `fault` or `verb`, how its trials ended."""
    lines = [
        f"| {of} | trials | exit statuses | broken laws | lost, s: median | most |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for name in [*names, "all"]:
        mine = [row for row in rows if name in (getattr(row, of).partition(" (")[0], "all")]
        if not mine:
            continue
        ends = sorted({row.statuses.replace(" ", ", then ") for row in mine})
        shown = "; ".join(ends) if name != "all" else ""
        num_broken, lost_s = sum(bool(row.broken) for row in mine), [r.lost_s for r in mine]
        lines.append(
            f"| {name} | {len(mine)} | {shown} | {num_broken} | {median(lost_s):.1f} | "
            f"{max(lost_s):.1f} |"
        )
    return "\n".join(lines) + "\n"


def missing(rows: list[Row], num_kills: int, num_faults: int, kinds: list[str]) -> Iterator[int]:
    """Yields the seeds that are to be run, of faults and of kills in turn; `rows` grows meanwhile.

    Kills go on until so many commands were killed, for some are over before.
    """
    done = {row.seed for row in rows}
    faults = list(FAULTS)
    seeds = (seed for seed in range(FIRST_SEED, FIRST_SEED + num_faults) if seed not in done)
    of_faults = (seed for seed in seeds if faults[seed % len(faults)] in (kinds or faults))
    of_kills = (seed for seed in range(FIRST_SEED) if seed not in done)
    is_done = False
    while not is_done:
        is_done = True
        for seed in itertools.islice(of_faults, 1):
            yield seed
            is_done = False
        if sum(row.fault == "SIGKILL" for row in rows) < num_kills:
            yield next(of_kills)
            is_done = False


def run_requeues(work: Path, path: Path, number: int) -> None:
    """Requeues a job of two tasks, one on each of two nodes, which then runs to its end.

    A row for the whole; a line each in docs/requeues_two_nodes.md. It must end as two processes do
    that nothing has disturbed.
    """
    options = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=600"
    config = RequeueStudyConfig(
        options=options,
        max_steps=3 * number,
        run_dir="runs/requeues",
        output="docs/requeues_two_nodes",
        num_requeues=number,
        timeout_s=LIMIT_S,
    )
    cluster = Cluster()
    try:
        cluster.start()
        os.environ |= cluster.environment
        requeue_study.study(config)
    finally:
        cluster.stop()
    rows = json.loads(Path(f"{config.output}.json").read_text(encoding="ascii"))["requeues"]
    whole = Path("runs/requeues_undisturbed")
    arguments = ["train", *requeue_study.train_arguments(config, str(whole))]
    process = Process([*arguments, "trainer.devices=2"], work / "whole.log", is_forked=False)
    status = process.wait(10 * LIMIT_S)
    kept = ("checkpoints", "export")
    pairs = [(contents(Path(config.run_dir) / name), contents(whole / name)) for name in kept]
    # Beside the checkpoints of an unbroken run the last of a stop may be kept.
    names = [name for pair in pairs for name in differences(*pair)]
    broken = [name for name in names if not name.startswith("+step_")]
    broken += [f"{sum(row['hung'] for row in rows)} hung"] if any(r["hung"] for r in rows) else []
    lost_s = median(row["first_step_s"] for row in rows if not row["hung"])
    said = last_line(process.output())
    text = "; ".join(broken)
    append(path, Row(-1, "requeues", "train", f"{len(rows)}", f"{status}", text, lost_s, said))


def main(arguments: list[str]) -> int:
    """Is the command; returns 1 where a law is broken."""
    given = dict(argument.split("=", 1) for argument in arguments)
    work = Path(given.get("work", WORK)).resolve()
    if int(given.get("faults", 0)) and "LD_PRELOAD" not in os.environ:
        library = str(build_library(work))
        command = [sys.executable, "-m", "tests.reliability_run", *arguments]
        os.execve(sys.executable, command, os.environ | {"LD_PRELOAD": library})
    path = Path(given.get("output", "docs/reliability_trials.csv"))
    bench, rows = None, read(path)
    kinds = [kind for kind in given.get("kinds", "").split(",") if kind]
    num_kills, num_faults = int(given.get("number_of_kills", 0)), int(given.get("faults", 0))
    for seed in missing(rows, num_kills, num_faults, kinds):
        bench = bench or Bench(work)
        bench.clear()
        faults = list(FAULTS)
        trial = kill if seed < FIRST_SEED else FAULTS[faults[seed % len(faults)]]
        rows.append(trial(bench, seed))
        append(path, rows[-1])
    number_of_requeues = int(given.get("number_of_requeues", 0))
    if number_of_requeues and not any(row.fault == "requeues" for row in read(path)):
        run_requeues(work, path, number_of_requeues)
    rows = read(path)
    kills = [row for row in rows if row.fault == "SIGKILL"]
    print(table(kills, "verb", list(VERBS)))
    print(table([row for row in rows if row.fault in FAULTS], "fault", list(FAULTS)))
    for row in rows:
        if row.broken:
            print(f"seed {row.seed}, {row.fault}, {row.verb}: {row.broken}")
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    os.environ.setdefault("WANDB_MODE", "offline")
    sys.exit(main(sys.argv[1:]))
