"""The settings of `blackpoint report`, and which folders hold results."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges, require
from blackpoint.sampling.choices import Prompts
from blackpoint.sampling.runtime.tracking import WandbConfig

RESULTS = ("sweep.json", "images.parquet", "winners.jsonl")
"""Files by which folders of results are known."""


@dataclass
class ComparedImages:
    """How the images of a comparison are sampled."""

    seed: int = 0
    """Seed of the images, the same for every prompt."""
    num_steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance scale; 1 is off."""
    guidance_rescale: float = 0.7
    """Strength of the rescale of the guided output's standard deviation, 0 to 1."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1, ..."""


@dataclass
class ReportConfig:
    """The page about one run directory, or one folder of results; or about two checkpoints."""

    run_dir: PathText | None = field(default=MISSING, metadata={"unless": "compare"})
    """Run directory with metrics.csv, previews/ or evaluation/; or the folder of an evaluation, a
    search or a sweep."""
    output: OutputText | None = None
    """The page; if not set, run_dir/report.html, of a comparison compared.html."""
    evaluation: PathText | None = None
    """Evaluation or sweep that the page of a run directory shows; run_dir/evaluation if not set."""
    compare: list[PathText] | None = None
    """Two checkpoints of Stable Diffusion 1.x, 2.x or XL, such as two runs, to show side by side
    instead of run_dir: compare=["runs/a", "runs/b"]."""
    prompts: Prompts | None = None
    """Prompts of a comparison, at most 8; if not set, those of the second run's previews, or four
    of black, white, night and snow."""
    images: ComparedImages = field(default_factory=ComparedImages)
    every_s: float = 0
    """Seconds after which the page of a training under way is written again, and loaded again by
    the browser, until the run's last step or Ctrl-C; 0 writes it once."""
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(enabled=False))
    """The page and its tables at Weights & Biases, for evaluations, searches and sweeps."""

    def __post_init__(self) -> None:
        check_ranges(self, "", every_s=">= 0")
        is_pair = self.compare is None or len(set(self.compare)) == len(self.compare) == 2
        require(is_pair, "compare", self.compare, "two checkpoints, [A, B]")

    @property
    def folder(self) -> Path:
        """The folder that the page is about."""
        assert self.run_dir is not None
        return Path(self.run_dir)


def is_about_results(folder: Path) -> bool:
    """Whether a folder is of an evaluation, a search or a sweep, and not a training run."""
    is_run = (folder / "metrics.csv").is_file() and (folder / "checkpoints").is_dir()
    return not is_run and any((folder / name).is_file() for name in RESULTS)
