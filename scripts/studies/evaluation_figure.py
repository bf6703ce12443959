"""The README's figure, from the tables in docs/: python -m
blackpoint.scripts.studies.evaluation_figure.

Left, what each link of the chain of fixes gives (docs/ablation/settings.csv, three seeds); right,
what a search buys at equal cost (docs/comparison_24_steps/shares_0.csv).
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.plots import STYLE, draw_named
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import read_texts
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script

OPEN = "luminance spread over the references', open"
PANELS = {
    "luminance error": "distance from the luminance\nthat captions ask for (0 is best)",
    OPEN: "spread of luminance where captions\nleave it open, over the data's (1 is best)",
}
SHARE, NFE, OF_ALL = "judge's share", "NFE", "of best-of-32's"
QUARTER, NEAR = 0.25, 0.03
"""Of best-of-32's NFE: what the searches that are shown cost, at most so far from it."""
BESIDE = ("best of 32", "tilt, one image")


@dataclass
class FigureConfig:
    """Which tables, and where to."""

    ablation: str = "docs/ablation/settings.csv"
    """Settings over their seeds."""
    comparison: str = "docs/comparison_24_steps/shares_0.csv"
    """Every search."""
    output: str = "docs/evaluation.png"
    """The figure."""


@matplotlib.rc_context(STYLE)
def draw(config: FigureConfig) -> None:
    """Draws the figure; raises UserError for a table that is not there."""
    links = _read(config.ablation)
    searches = _read(config.comparison)
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=False):
        _bars(axis, [row["setting"] for row in links], links, name)
        axis.set_xlabel(label)
    axes[1].set_yticklabels([])
    axes[1].axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes[0].set_title("What each fix does (3 seeds)", loc="left")
    bars = sorted(filter(is_shown, searches), key=lambda row: float(row[SHARE]))
    names = [f"{row['search']} ({float(row[NFE]):.0f} NFE)" for row in bars]
    _bars(axes[2], names, bars, SHARE)
    axes[2].axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes[2].set_xlabel(
        "gain over one image, by a reader that nobody\nsearched with (best of 32 is 1)"
    )
    axes[2].set_title(f"What a search buys ({bars[0]['prompts']} prompts)", loc="left")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, bbox_inches="tight")
    write_whole(Path(config.output), content.getvalue())


def is_shown(row: dict[str, str]) -> bool:
    """Whether a search costs a quarter, or is one of those that stand beside."""
    return abs(float(row[OF_ALL]) - QUARTER) <= NEAR or row["search"] in BESIDE


def _bars(axis: Axes, names: list[str], rows: list[dict[str, str]], metric: str) -> None:
    estimates = []
    for row in rows:
        value, low, high = (float(row[metric + end]) for end in ("", ": low", ": high"))
        estimates.append(Estimate(value, low, high, int(row[f"{metric}: n"])))
    draw_named(axis, names, estimates, "o")


def _read(path: str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise UserError(
            f"{path} is not there; make the tables by python -m "
            "blackpoint.scripts.studies.ablation, and python -m "
            "blackpoint.scripts.studies.comparison"
        )
    return read_texts(Path(path))


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("evaluation_figure", lambda: draw(load(FigureConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
