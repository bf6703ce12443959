"""What halving must know beforehand: how well previews rank candidates, by whole runs of a few.

The runs have seeds of their own and are in output/calibration; they count in no budget and in the
ledger under `beside`. One process measures, the others wait for what it found.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.search.algorithm_configs import HalvingConfig
from blackpoint.sampling.search.algorithms.halving import measured_kendall, pruning_levels, walk
from blackpoint.sampling.search.journal import ROWS, Journal, read_rows
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.search.search import drive, open_search
from blackpoint.sampling.search.trial import Problem

FOLDER, FOUND = "calibration", "kendall.json"


def calibrate(
    config: HalvingConfig,
    runner: TrialRunner,
    prompts: list[int],
    seed: int,
    output: Path,
    values: Callable[[Sequence[Mapping[str, Any]]], list[float]],
) -> dict[int, float]:
    """Returns Kendall's tau of preview and final score for each level, measured or as kept.

    values: what candidates of one prompt and level are ranked by, from their rows.
    """
    folder, steps = output / FOLDER, runner.grid.num_steps
    if not (folder / FOUND).is_file():
        levels = pruning_levels(config, steps, None)
        parts = zip((0, *levels), (*levels, steps), strict=True)
        budget = sum(runner.cost(*part) for part in parts) * config.calibration_candidates
        journal = Journal(folder)
        try:
            drive(
                runner,
                journal,
                (
                    open_search(
                        Problem(index, seed + 1, runner.grid, runner.cost, budget),
                        lambda problem: walk(problem, levels, config.calibration_candidates, 1.0),
                    )
                    for index in prompts[: config.calibration_prompts]
                ),
                needs_winner=False,
            )
        finally:
            journal.close()
        found = measured_kendall(read_rows(folder / ROWS), values)
        write_whole(folder / FOUND, json.dumps(found, indent=1) + "\n")
    return read_kendall(output)


def is_calibrated(output: Path) -> bool:
    """Tells whether the measurement is there."""
    return (output / FOLDER / FOUND).is_file()


def read_kendall(output: Path) -> dict[int, float]:
    """Returns what was measured, by level."""
    found = json.loads((output / FOLDER / FOUND).read_text(encoding="utf-8"))
    return {int(level): tau for level, tau in found.items()}


def calibration_line(config: HalvingConfig, num_steps: int, kendall: dict[int, float]) -> str:
    """Says what was measured and what follows."""
    allowed = pruning_levels(config, num_steps, kendall)
    shown = ", ".join(f"{tau:.2f} after {level}" for level, tau in sorted(kendall.items()))
    return (
        f"Kendall's tau of preview and final score: {shown or 'not to be measured'} of "
        f"{num_steps} steps; prunes after {', '.join(map(str, allowed)) or 'none of them'}"
    )
