"""The comparison of searches at equal NFE: python -m blackpoint.scripts.studies.comparison runs its
sweep and keeps its tables; configs/comparison.yaml says what is compared. The same command
continues it."""

import sys
from dataclasses import dataclass, field

from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.ablation import blackpoint
from blackpoint.scripts.studies.keep_sweep import KeepConfig, keep

YAML, RUN_DIR = "configs/comparison.yaml", "runs/comparison"


@dataclass
class ComparisonConfig:
    """How much is run at once, and where the tables go."""

    num_processes: int = 2
    """Cells that are run at once."""
    output: str = "docs/comparison"
    """Folder of the tables."""
    metrics: list[str] = field(default_factory=lambda: ["judge", "reader (searched)"])
    """Metrics of the figure and of the curves."""


def compare(config: ComparisonConfig) -> None:
    """Runs every step that is not done yet."""
    blackpoint("sweep", YAML, f"num_processes={config.num_processes}")
    blackpoint("report", f"run_dir={RUN_DIR}")
    keep(KeepConfig(RUN_DIR, config.output, config.metrics))


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("comparison", lambda: compare(load(ComparisonConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
