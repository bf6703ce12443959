"""`python -m blackpoint.scripts.measurements.requeue_study`: twenty requeues in a row, and how many
of them hung.

Submits slurm/train.sbatch to the SLURM at hand and, each time training has made a step, sends
SIGUSR1 as at a time limit. Started again, it goes on with the rows that are missing. Without a
cluster: `python -m tests.slurm_cluster python -m blackpoint.scripts.measurements.requeue_study`.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.report.page import Page
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.records.run_directory import newest_step

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class RequeueStudyConfig:
    """Which job is requeued, and how often."""

    config: str = "configs/tiny_zero_snr.yaml"
    """The fine-tune that the job runs."""
    options: str = "--nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 --time=120"
    """Options of sbatch; partition and account go here."""
    arguments: str = ""
    """More key=value of the run."""
    max_steps: int | None = None
    """Last step of the run, to which it goes after the requeues. Not set: it is cancelled then."""
    run_dir: str = "runs/requeue_study"
    """Where the job trains; removed by hand before another study."""
    output: str = "docs/requeue"
    """Writes this name with .json and .md."""
    num_requeues: int = 20
    """Rows in all."""
    timeout_s: float = 180.0
    """A requeue that has made no step after this time counts as hung."""
    budget_s: float | None = None
    """Begin no further requeue after this time; the same command goes on. Not set: no limit."""


@dataclass
class Requeue:
    """One row; seconds since the signal."""

    step: int
    saved_s: float | None = None
    start_s: float | None = None
    first_step_s: float | None = None
    hung: bool = True


def study(config: RequeueStudyConfig) -> int:
    """Adds the missing rows and writes both files after each; returns the exit status."""
    path = Path(config.output).with_suffix(".json")
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"requeues": []}
    rows = [Requeue(**row) for row in recorded["requeues"]]
    begun_s = time.monotonic()
    job = None
    try:
        while len(rows) < config.num_requeues:
            if config.budget_s is not None and time.monotonic() - begun_s > config.budget_s:
                break
            if job is None or rows[-1].hung:
                if job is not None:
                    cancel(job)
                job = submit(config)
            row = requeue_once(job, Path(config.run_dir), config.timeout_s)
            rows.append(row)
            print(f"{len(rows)}: {asdict(row)}", file=sys.stderr, flush=True)
            write(path, config, rows)
        if job is not None and config.max_steps is not None and not rows[-1].hung:
            ended = wait_for(lambda: job_state(job)["JobState"] in ENDED, config.timeout_s)
            write(path, config, rows, job_state(job)["JobState"] if ended else "hung")
    finally:
        if job is not None:
            cancel(job)
    return 0


def submit(config: RequeueStudyConfig) -> str:
    """Submits the job and returns its id."""
    options = ["--parsable", *shlex.split(config.options)]
    return run(
        "sbatch", *options, "slurm/train.sbatch", *train_arguments(config, config.run_dir)
    ).strip()


def train_arguments(config: RequeueStudyConfig, run_dir: str) -> list[str]:
    """Returns those of `blackpoint train` for a run that saves at a signal and at its end."""
    last = config.max_steps or 10_000_000
    keys: dict[str, Any] = {"run_dir": run_dir, "trainer.max_steps": last}
    keys |= {"trainer.checkpoint_every_steps": last, "trainer.log_every_steps": 1}
    keys |= {"trainer.validate_every_steps": 0, "preview.every_steps": 0, "wandb.enabled": "false"}
    given = [f"{key}={value}" for key, value in keys.items()]
    return [config.config, *given, *shlex.split(config.arguments)]


def requeue_once(job: str, run_dir: Path, timeout_s: float) -> Requeue:
    """Waits for a step, sends the signal and follows the job to its next step."""
    saved = newest_step(run_dir)
    if not wait_for(lambda: last_step(run_dir) > saved, timeout_s):
        raise RunFailed(f"job {job} makes no steps; look at slurm/logs/*-{job}.out")
    restarts = int(job_state(job)["Restarts"])
    row = Requeue(step=0)
    run("scancel", "--signal=USR1", job)
    sent_s = time.monotonic()
    if wait_for(lambda: newest_step(run_dir) > saved, timeout_s):
        row.saved_s = round(time.monotonic() - sent_s, 2)
        row.step = newest_step(run_dir)

    def started_again() -> bool:
        state = job_state(job)
        return int(state["Restarts"]) > restarts and state["JobState"] == "RUNNING"

    if row.saved_s is not None and wait_for(started_again, timeout_s):
        row.start_s = round(time.monotonic() - sent_s, 2)
    if row.start_s is not None and wait_for(lambda: last_step(run_dir) > row.step, timeout_s):
        row.first_step_s = round(time.monotonic() - sent_s, 2)
        row.hung = False
    return row


def last_step(run_dir: Path) -> int:
    """Returns the newest step in metrics.csv, 0 without one."""
    path = run_dir / "metrics.csv"
    rows = read_metrics(path).get("train/loss", []) if path.exists() else []
    return rows[-1][0] if rows else 0


def job_state(job: str) -> dict[str, str]:
    """Returns what scontrol says of a job, by its names."""
    words = run("scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def cancel(job: str) -> None:
    """Ends the job, unless it has ended; it saves, and is waited for."""
    if job_state(job)["JobState"] in ENDED:
        return
    run("scancel", job)
    wait_for(lambda: job_state(job)["JobState"] in ENDED, 60)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Polls; returns whether it came true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def run(*command: str) -> str:
    """Runs a client of SLURM and returns what it prints."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here; run this on a login node") from None
    except subprocess.CalledProcessError as error:
        raise RunFailed(f"{' '.join(command[:2])}: {error.stderr.strip()}") from None
    return answer.stdout


def write(path: Path, config: RequeueStudyConfig, rows: list[Requeue], end: str = "") -> None:
    """Writes every row, how the job ended if it went to its end, and the page."""
    slurm = run("sinfo", "--version").strip()
    content: dict[str, Any] = {**describe_machine(), "slurm": slurm, "settings": asdict(config)}
    content["requeues"] = [asdict(row) for row in rows]
    if end:
        content["end"] = {"state": end, "step": last_step(Path(config.run_dir))}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    path.with_suffix(".md").write_text(page(content), encoding="ascii")


def page(content: dict[str, Any]) -> str:
    """Writes the summary and one line a requeue."""
    rows = content["requeues"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    end, settings = content.get("end"), content["settings"]
    arguments = f"{settings['config']} {settings['arguments']}".strip()
    ended = f" Then the job ended {end['state']} at step {end['step']}." if end else ""
    names = ("saved_s", "start_s", "first_step_s")
    lines = [
        (number, row["step"], *("hung" if row[name] is None else row[name] for name in names))
        for number, row in enumerate(rows, start=1)
    ]
    known = [[row[name] for row in rows if row[name] is not None] for name in names]
    lines.append(("median", None, *(median(values) if values else None for values in known)))
    times = dict.fromkeys(["saved", "second start", "next step"], ".1f")
    return Page(
        "Requeues in a row",
        [
            f"{sum(row['hung'] for row in rows)} of {len(rows)} requeues hung.{ended}",
            f"`python -m blackpoint.scripts.measurements.requeue_study` on "
            f"{content['date']}: {content['machine']}; "
            f"{content['slurm']}, {versions}.\n"
            f"The job: `sbatch {settings['options']} slurm/train.sbatch {arguments}`. Each time it "
            "has made a step it gets SIGUSR1, as at a time limit. Hung: no new step within "
            f"{settings['timeout_s']:.0f} s of a wait. Seconds since the signal; raw rows: "
            f"{Path(settings['output']).name}.json.",
            Table.of({"requeue": "", "step saved": "", **times}, lines),
        ],
    ).markdown()


def main() -> int:
    """Is the command."""
    try:
        return study(load(RequeueStudyConfig, sys.argv[1:]))
    except (UserError, RunFailed) as error:
        print(f"requeue_study: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
