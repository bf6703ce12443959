"""What do curves of good and bad runs look like? python -m
blackpoint.scripts.studies.training_curves

Trains the embedded base (configs/tiny_zero_snr.yaml) for a few steps in several ways and draws
loss, gradient and last previews side by side. The same command goes on where it stopped.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.plots import COLORS, STYLE
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digits import packed_digits
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.study import blackpoint
from blackpoint.train.records.metrics_file import read_metrics

YAML, RUN_DIR, NUM_FEW = "configs/tiny_zero_snr.yaml", Path("runs/training_curves"), 32
LOSSES = {"train/loss": "training", "validation/loss": "validation"}
NORM = "train/gradient_norm"
FEW = f"{NUM_FEW} images"
RUNS: dict[str, tuple[str, ...]] = {
    "well": (),
    "rate 100 times too high": ("optimizer.learning_rate=5e-2",),
    "rate 100 times too low": ("optimizer.learning_rate=5e-6",),
    FEW: (),
}
"""Title -> keys of `blackpoint train`."""


@dataclass
class CurvesConfig:
    """How long each run is, and where the picture goes."""

    max_steps: int = 120
    """Optimizer steps of each run."""
    output: str = "docs/training_curves"
    """Picture (.png) and numbers (.csv) to write."""


def study(config: CurvesConfig) -> None:
    """Trains what is missing and draws all."""
    for title, options in RUNS.items():
        run_dir = folder(title)
        if title == FEW:
            options = (f"data.shards={packed_digits(RUN_DIR, 'train', NUM_FEW)}",)
        shared = {
            "run_dir": run_dir,
            "trainer.max_steps": config.max_steps,
            "trainer.validate_every_steps": max(1, config.max_steps // 12),
            "trainer.checkpoint_every_steps": config.max_steps,
            "data.validation_images": 64,
            "preview.every_steps": config.max_steps,
            "preview.num_images": 1,
            "wandb.enabled": "false",
        }
        if not (run_dir / "export").exists():
            blackpoint(
                "train", YAML, *(f"{key}={value}" for key, value in shared.items()), *options
            )
    draw(config.output)


def folder(title: str) -> Path:
    """Returns the run directory of a title."""
    return RUN_DIR / title.replace(" ", "_")


@matplotlib.rc_context(STYLE)
def draw(output: str) -> None:
    """Draws a column a run, and writes the numbers in it."""
    figure = Figure(figsize=(3 * len(RUNS), 9), layout="constrained")
    axes = figure.subplots(3, len(RUNS), sharey="row", height_ratios=(3, 2, 5))
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("run", "metric", "step", "value"))
    for title, (loss, norm, preview) in zip(RUNS, axes.T, strict=True):
        metrics = read_metrics(folder(title) / "metrics.csv")
        for name, color in zip((*LOSSES, NORM), COLORS, strict=False):
            steps, values = zip(*metrics[name], strict=True)
            axis = norm if name == NORM else loss
            axis.plot(steps, values, color=color, label=LOSSES.get(name), linewidth=1.2)
            writer.writerows((title, name, *row) for row in metrics[name])
        loss.set_title(title, loc="left")
        for axis in (loss, norm):
            axis.set_yscale("log")
        norm.set_xlabel("optimizer steps")
        show_last_preview(preview, folder(title))
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("norm of the gradient")
    axes[0, 0].legend()
    figure.savefig(picture := io.BytesIO(), dpi=90, format="png")
    whole = Image.open(picture).convert("RGB").quantize(256)
    whole.save(small := io.BytesIO(), format="png", optimize=True)
    write_whole(Path(f"{output}.png"), small.getvalue())
    write_whole(Path(f"{output}.csv"), rows.getvalue())


def show_last_preview(axis: Axes, run_dir: Path) -> None:
    """Shows a run's last grid, whose labels tell the luminance of each picture."""
    with Image.open(max((run_dir / "previews").glob("step_*.png"))) as grid:
        axis.imshow(grid)
    axis.set_axis_off()


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("training_curves", lambda: study(load(CurvesConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
