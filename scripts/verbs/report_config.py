"""The settings of `blackpoint report`, and which folders hold results."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.runtime.tracking import WandbConfig

RESULTS = ("sweep.json", "images.parquet", "winners.jsonl")
"""Files by which folders of results are known."""


@dataclass
class ReportConfig:
    """The page about one run directory, or one folder of results."""

    run_dir: PathText = MISSING
    """Run directory with metrics.csv, previews/ or evaluation/; or the folder of an evaluation, a
    search or a sweep."""
    output: OutputText | None = None
    """The page; run_dir/report.html if not set."""
    evaluation: PathText | None = None
    """Evaluation or sweep that the page of a run directory shows; run_dir/evaluation if not set."""
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(enabled=False))
    """The page and its tables at Weights & Biases, for evaluations, searches and sweeps."""


def is_about_results(folder: Path) -> bool:
    """Whether a folder is of an evaluation, a search or a sweep, and not a training run."""
    is_run = (folder / "metrics.csv").is_file() and (folder / "checkpoints").is_dir()
    return not is_run and any((folder / name).is_file() for name in RESULTS)
