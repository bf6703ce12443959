"""Studies that are sweeps: python -m blackpoint.scripts.studies.study
config=configs/stability.yaml output=docs/x.

Runs the sweep, writes its report and keeps its tables and rows in a folder of the repository. The
same command continues what was stopped.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.report.results import Results, read_results
from blackpoint.scripts.config import load, read_yaml
from blackpoint.scripts.miniature.digits import packed_digits
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.keep_sweep import KeepConfig, keep
from blackpoint.scripts.verb_process import verb_command

NUM_HELD_OUT = 2000


@dataclass
class StudyConfig:
    """Which sweep, how much at once, and where its tables go."""

    config: str = MISSING
    """The sweep's YAML file."""
    output: str = MISSING
    """Folder of the tables; what is there is replaced."""
    num_processes: int = 2
    """Cells that are run at once."""
    digits: int = 0
    """Images of real digits to pack first: so many to train on, in run_dir/shards/train, and 2,000
    to measure against, in run_dir/digits/held_out; 0: none."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of the figure and of the table of settings, in order; the first six if empty."""


def run_study(
    config: str,
    output: str,
    num_processes: int = 2,
    metrics: Sequence[str] = (),
    tables: Sequence[str] = ("*",),
) -> Results:
    """Runs what is missing of a sweep, reports and keeps it; returns what it found."""
    run_dir = str(read_yaml(config)["run_dir"])
    blackpoint("sweep", config, f"num_processes={num_processes}")
    blackpoint("report", f"run_dir={run_dir}")
    keep(KeepConfig(run_dir, output, list(metrics), list(tables)))
    return read_results(Path(run_dir))


def blackpoint(*arguments: str) -> None:
    """Runs a verb in a process of its own; raises RunFailed where it fails."""
    status = subprocess.run(verb_command(*arguments), check=False).returncode
    if status:
        raise RunFailed(f"blackpoint {' '.join(arguments)} ended with {status}; run this again")


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""

    def study() -> None:
        asked = load(StudyConfig, argv)
        if asked.digits:
            run_dir = Path(str(read_yaml(asked.config)["run_dir"]))
            packed_digits(run_dir, "train", asked.digits)
            packed_digits(run_dir, "held_out", NUM_HELD_OUT)
        run_study(asked.config, asked.output, asked.num_processes, asked.metrics)

    return run_script("study", study)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
