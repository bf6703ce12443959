"""Measurements before a search: how well early scores rank candidates, and the batch size.

The whole runs that tell how previews or drafts rank have seeds of their own and are in
output/calibration; they count in no budget and in the ledger under `beside`. One process measures,
the others wait for what it found. kendall.json has Kendall's tau of early and final score by look
and prompt; a search sees their mean and its one-sided lower 95 % bound by Student's t, -1 of fewer
than two prompts.

The batch size that is found is the smallest that is about as fast as any that fits: one step and a
decode are timed at 1, 2, 4, ... until memory ends or a doubling gains nothing. It moves what a
search chooses only among near-ties (docs/search.md).
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.search.driver import drive
from blackpoint.sampling.search.journal import ROWS, Journal, read_rows
from blackpoint.sampling.search.problem import (
    Algorithm,
    Correlation,
    Problem,
    Seeded,
    Trial,
)
from blackpoint.sampling.search.runner import TrialRunner

FOLDER, FOUND = "calibration", "kendall.json"
LARGEST, LEAST_GAIN = 128, 1.05
Values = Callable[[Sequence[Mapping[str, Any]]], list[float]]
"""Ranking values of the candidates of one prompt and look, from their rows."""


def calibrate(
    algorithm: Algorithm,
    config: Any,
    runner: TrialRunner,
    prompts: Sequence[int],
    seed: int,
    output: Path,
    values: Values,
) -> None:
    """Measures Kendall's tau of early and final score for each look, unless that was done."""
    folder, about = output / FOLDER, algorithm.calibration
    if about is None or is_calibrated(output):
        return
    walk, looks = about.walk, about.looks(config, runner.grid.num_steps)
    problems = (
        Problem(index, seed + 1, runner.grid, runner.cost, sys.maxsize)
        for index in prompts[: config.calibration_prompts]
    )
    with closing(Journal(folder)) as journal:
        drive(
            runner,
            journal,
            problems,
            lambda problem: walk(problem, looks, config.calibration_candidates),
            needs_winner=False,
        )
    taus = measured_taus(read_rows(folder / ROWS), values)
    write_whole(folder / FOUND, json.dumps(taus, indent=1) + "\n")


def measured_taus(rows: Iterable[Mapping[str, Any]], values: Values) -> dict[int, list[float]]:
    """Returns Kendall's tau-b of early and final score of each prompt, by look.

    `rows` are those of candidates.jsonl after a calibration's walk; a look is where they stop.
    Prompts whose values are all equal say nothing and are left out.
    """
    from scipy import stats

    by_key = {(row["prompt_index"], row["candidate"]): row for row in rows}
    pairs: dict[tuple[int, int], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for (prompt, _), row in by_key.items():
        if row["goal"] != "final" or row["score"] is None:
            continue
        before = row
        while before["parent"] is not None:
            before = by_key[prompt, before["parent"]]
            if before["score"] is not None:
                pairs.setdefault((before["stop"], prompt), []).append((before, row))
    taus: dict[int, list[float]] = {}
    for (look, _), outcomes in sorted(pairs.items()):
        early, finals = zip(*outcomes, strict=True)
        tau = float(stats.kendalltau(values(early), values(finals)).statistic)
        if not math.isnan(tau):
            taus.setdefault(look, []).append(tau)
    return taus


def correlation(taus: Sequence[float]) -> Correlation:
    """Returns the mean and its lower bound: mean - t_(.95, n - 1) s / sqrt(n)."""
    from scipy import stats

    mean, count = sum(taus) / len(taus), len(taus)
    if count < 2:
        return Correlation(mean, -1.0)
    variance = sum((tau - mean) ** 2 for tau in taus) / (count - 1)
    return Correlation(mean, mean - stats.t.ppf(0.95, count - 1) * math.sqrt(variance / count))


def is_calibrated(output: Path) -> bool:
    """Tells whether the measurement is there."""
    return (output / FOLDER / FOUND).is_file()


def read_kendall(output: Path) -> dict[int, Correlation]:
    """Returns the measured correlations by look."""
    kendall = json.loads((output / FOLDER / FOUND).read_text(encoding="utf-8"))
    return {
        int(look): correlation(taus if isinstance(taus, list) else [taus])  # once the mean alone
        for look, taus in kendall.items()
    }


def calibration_line(choice: str, num_steps: int, kendall: Mapping[int, Correlation]) -> str:
    """Tells the measured correlations, and what a search makes of them."""
    shown = ", ".join(
        f"{tau.value:.2f} (at least {tau.low:.2f}) at {look}"
        if tau.low > -1
        else f"{tau.value:.2f} (of too few prompts for a bound) at {look}"
        for look, tau in sorted(kendall.items())
    )
    return (
        f"Kendall's tau of early and final score: {shown or 'not to be measured'} of "
        f"{num_steps} steps; {choice}"
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
