"""Are stable noises better noises? python -m blackpoint.scripts.studies.stability_study runs
configs/stability.yaml.

Keeps every score of every noise, which scores rank a prompt's noises alike, what the best of k is
worth, and, here, each method beside one image and best-of-N of as many NFE, paired over prompts.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.results import Cell, Results
from blackpoint.sampling.report.results_page import table_files
from blackpoint.sampling.report.results_tables import CHANGE, marked_change
from blackpoint.sampling.statistics.estimates import smallest_detectable_effect
from blackpoint.sampling.statistics.paired import count_outcomes, holm, mean_difference
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.study import run_study

YAML = "configs/stability.yaml"
TABLES = ("cells", "ranks", "best_of_k")
QUALITIES = ("reader", "judge", "background")
RIVALS = ("one image", "one image with guidance 7.5")
EQUAL_NFE = {
    "selection, 4 steps": "best of 200",
    "optimisation of stability, 4 steps": "best of 600",
    "optimisation with the inverse held fixed, 4 steps": "best of 200",
    "optimisation of the reader, 4 steps": "best of 300",
    "selection, 10 steps": "best of 200",
    "optimisation with the inverse held fixed, 10 steps": "best of 200",
}
"""Method -> best-of-N of as many NFE."""


@dataclass
class StabilityStudyConfig:
    """How much is run at once, and where the tables go."""

    num_processes: int = 2
    """Searches that are run at once."""
    output: str = "docs/stability_study"
    """Folder of the tables and rows."""


def study(config: StabilityStudyConfig) -> None:
    """Runs what is missing and keeps the tables."""
    results = run_study(YAML, config.output, config.num_processes, QUALITIES, TABLES)
    for name, content in table_files([versus(results)]).items():
        write_whole(Path(config.output) / name, content)


def versus(results: Results) -> Table:
    """Compares each method with its rivals by each quality."""
    cells = {(cell.arm, cell.varied["search.checkpoint"]): cell for cell in results.cells}
    rows = []
    for (arm, checkpoint), cell in cells.items():
        if arm in EQUAL_NFE and cell.paired:
            steps = arm.rpartition(", ")[2]
            rivals = [f"{rival}, {steps}" for rival in (EQUAL_NFE[arm], *RIVALS)]
            rows += list(_lines(cell, [cells[rival, checkpoint] for rival in rivals]))
    note = (
        "Paired over prompts: difference of means with its 95 % bootstrap interval (bold where it "
        "leaves out 0); wins, ties and losses with the exact binomial test, corrected by Holm over "
        "the lines of a method. Best-of-N searches with the reader, which it therefore raises; "
        "the others judge. Would have shown: with power 0.8."
    )
    columns = dict.fromkeys(("method", "checkpoint"), "") | {"NFE": ".0f", "rival": ""}
    columns |= {"its NFE": ".0f", "quality": "", "difference": CHANGE}
    columns |= {"wins / ties / losses": "", "p (Holm)": ".2g", "would have shown": ".2g"}
    filters = ("method", "checkpoint", "rival", "quality")
    return Table(rows, columns, "Methods beside their rivals", note, "versus", filters=filters)


def _lines(cell: Cell, rivals: list[Cell]) -> Iterator[dict[str, Any]]:
    pairs = {
        (rival.arm, quality): (rival, *_paired(cell, rival, quality))
        for rival in rivals
        for quality in QUALITIES
    }
    outcomes = {key: count_outcomes(ours, theirs) for key, (_, ours, theirs) in pairs.items()}
    adjusted = holm({" ".join(key): outcome.p_value for key, outcome in outcomes.items()})
    for (arm, quality), (rival, ours, theirs) in pairs.items():
        outcome = outcomes[arm, quality]
        yield {
            "method": cell.arm,
            "checkpoint": cell.varied["search.checkpoint"],
            "NFE": cell.nfe,
            "rival": arm,
            "its NFE": rival.nfe,
            "quality": quality,
            "difference": marked_change(mean_difference(ours, theirs)),
            "wins / ties / losses": f"{outcome.wins} / {outcome.ties} / {outcome.losses}",
            "p (Holm)": adjusted[f"{arm} {quality}"],
            "would have shown": smallest_detectable_effect(ours - theirs),
        }


def _paired(cell: Cell, rival: Cell, quality: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a quality, searched with or not, of the prompts that both have."""
    ours, theirs = (
        side.paired.get(quality) or side.paired[f"{quality} (searched)"] for side in (cell, rival)
    )
    shared = sorted(ours.keys() & theirs.keys())
    return np.array([ours[key] for key in shared]), np.array([theirs[key] for key in shared])


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("stability_study", lambda: study(load(StabilityStudyConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
