"""Measurements before a search: how well previews rank candidates, and the batch size.

The whole runs that tell how previews rank have seeds of their own and are in output/calibration;
they count in no budget and in the ledger under `beside`. One process measures, the others wait for
what it found.

The batch size that is found is the smallest that is about as fast as any that fits: one step and a
decode are timed at 1, 2, 4, ... until memory ends or a doubling gains nothing. It moves what a
search chooses only among near-ties (docs/search.md).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.search.algorithms.halving import HalvingConfig, measured_kendall, walk
from blackpoint.sampling.search.driver import drive
from blackpoint.sampling.search.journal import ROWS, Journal, read_rows
from blackpoint.sampling.search.problem import Problem, Seeded, Trial
from blackpoint.sampling.search.runner import TrialRunner

FOLDER, FOUND = "calibration", "kendall.json"
LARGEST, LEAST_GAIN = 128, 1.05
Values = Callable[[Sequence[Mapping[str, Any]]], list[float]]
"""Ranking values of the candidates of one prompt and level, from their rows."""


def calibrate(
    config: HalvingConfig,
    levels: list[int],
    runner: TrialRunner,
    prompts: Sequence[int],
    seed: int,
    output: Path,
    values: Values,
) -> None:
    """Measures Kendall's tau of preview and final score for each level, unless that was done."""
    folder, steps, count = output / FOLDER, runner.grid.num_steps, config.calibration_candidates
    if is_calibrated(output):
        return
    parts = zip((0, *levels), (*levels, steps), strict=True)
    budget = sum(runner.cost(*part) for part in parts) * count
    problems = (
        Problem(index, seed + 1, runner.grid, runner.cost, budget)
        for index in prompts[: config.calibration_prompts]
    )
    make = partial(walk, levels=levels, count=count, keep=1.0)
    with closing(Journal(folder)) as journal:
        drive(runner, journal, problems, make, needs_winner=False)
    kendall = measured_kendall(read_rows(folder / ROWS), values)
    write_whole(folder / FOUND, json.dumps(kendall, indent=1) + "\n")


def is_calibrated(output: Path) -> bool:
    """Tells whether the measurement is there."""
    return (output / FOLDER / FOUND).is_file()


def read_kendall(output: Path) -> dict[int, float]:
    """Returns the measured correlations by level."""
    kendall = json.loads((output / FOLDER / FOUND).read_text(encoding="utf-8"))
    return {int(level): tau for level, tau in kendall.items()}


def calibration_line(allowed: list[int], num_steps: int, kendall: dict[int, float]) -> str:
    """Tells the measured correlations, and the levels at which a search may prune."""
    shown = ", ".join(f"{tau:.2f} after {level}" for level, tau in sorted(kendall.items()))
    return (
        f"Kendall's tau of preview and final score: {shown or 'not to be measured'} of "
        f"{num_steps} steps; prunes after {', '.join(map(str, allowed)) or 'none of them'}"
    )


def find_batch_size(runner: TrialRunner, prompt_index: int) -> int:
    """Returns how many candidates to run at once; leaves the runner's ledger as it was."""
    best, best_rate, size = 1, 0.0, 1
    while size <= LARGEST:
        try:
            seconds = min(_seconds(runner, prompt_index, size) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, size // 4)  # half of what fitted: verifiers need room, too
        rate = size / seconds
        if rate < LEAST_GAIN * best_rate:
            return best
        best, best_rate, size = size, rate, 2 * size
    return best


def _seconds(runner: TrialRunner, prompt_index: int, size: int) -> float:
    trials = [Trial(0, number, Seeded(number), 1, "preview", number) for number in range(size)]
    started_s = time.perf_counter()
    runner.rehearse([(prompt_index, trial) for trial in trials])
    if runner.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
