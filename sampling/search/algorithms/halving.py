"""Successive halving on previews: many noises start, the worse share is dropped at each level.

Jamieson and Talwalkar 2016, with the verifier's score of the x0-prediction in place of a partial
training's. A preview that does not tell what the final score will be prunes at random, so a level
prunes only where the rank correlation (Kendall's tau) of preview and final score, measured
beforehand on whole runs (`measured_kendall`), is high enough.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blackpoint.data.files.rules import check_ranges, require
from blackpoint.sampling.search.problem import (
    Algorithm,
    Goal,
    Outcome,
    Problem,
    Search,
    Seeded,
    Trial,
)


@dataclass
class HalvingConfig:
    """Successive halving."""

    levels: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Where to look, in shares of the sampling steps."""
    keep: float = 0.5
    """Share of the candidates that stays at each of them."""
    min_kendall: float = 0.3
    """Least rank correlation of preview and final score at which a level prunes."""
    calibration_prompts: int = 8
    """Prompts, the first ones, on which that correlation is measured, beside the budget."""
    calibration_candidates: int = 8
    """Whole runs of each of them for the measurement."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        are_shares = self.levels and rising and 0 < self.levels[0] <= self.levels[-1] < 1
        require(are_shares, "halving.levels", self.levels, "shares between 0 and 1, rising")
        check_ranges(self, "halving.", calibration_prompts=">= 1", calibration_candidates=">= 2")
        check_ranges(self, "halving.", keep="> 0 and < 1", min_kendall=">= -1 and <= 1")


def pruning_levels(
    config: HalvingConfig, num_steps: int, kendall: Mapping[int, float] | None
) -> list[int]:
    """Returns the levels that prune: those of the config that the measurement allows.

    `kendall` maps a level to its rank correlation; None takes all levels (it is what the
    measurement itself runs with).
    """
    nearest = (round(share * num_steps) for share in config.levels)
    levels = sorted({min(max(level, 1), num_steps - 1) for level in nearest})
    if kendall is None:
        return levels
    return [level for level in levels if kendall.get(level, -1.0) >= config.min_kendall]


def num_candidates(problem: Problem, levels: Sequence[int], keep: float) -> int:
    """Returns how many noises can start so that the survivors complete inside the budget."""
    count = 0
    while spent(problem, levels, keep, count + 1) <= problem.budget_nfe:
        count += 1
    return count


def spent(problem: Problem, levels: Sequence[int], keep: float, count: int) -> int:
    """Returns the NFE of `count` noises that are halved at `levels`."""
    total, before = 0, 0
    for level in (*levels, problem.grid.num_steps):
        total += count * problem.cost(before, level)
        count, before = max(1, round(count * keep)), level
    return total


def halving(problem: Problem, config: HalvingConfig) -> Search:
    """Starts as many noises as the budget completes; without pruning levels it is best-of-N."""
    levels = pruning_levels(config, problem.grid.num_steps, problem.kendall)
    count = num_candidates(problem, levels, config.keep)
    return walk(problem, levels, count, config.keep)


def least_nfe(problem: Problem, config: HalvingConfig) -> int:
    """Returns the NFE of one noise that is looked at wherever it may be."""
    levels = pruning_levels(config, problem.grid.num_steps, None)
    return spent(problem, levels, config.keep, 1)


def walk(problem: Problem, levels: Sequence[int], count: int, keep: float) -> Search:
    """Runs `count` noises from level to level and keeps a share at each; 1 keeps all of them.

    A continuation is a candidate of its own, whose parent it continues.
    """
    last, number = problem.grid.num_steps, 0
    seeds = [problem.draw_seed("candidate", index) for index in range(count)]
    kept: list[Outcome] = []
    for round_number, level in enumerate((*levels, last)):
        goal: Goal = "final" if level == last else "preview"
        trials = []
        for index in range(len(kept) or count):
            seed = kept[index].trial.seed if kept else seeds[index]
            start = kept[index].reached if kept else Seeded(seed)
            parent = kept[index].trial.candidate if kept else None
            trials.append(Trial(round_number, number, start, level, goal, seed, parent))
            number += 1
        outcomes = yield trials
        best = problem.best_first(outcomes)[: max(1, round(len(outcomes) * keep))]
        kept = sorted(best, key=lambda outcome: outcome.trial.candidate)


def measured_kendall(
    rows: Iterable[Mapping[str, Any]], values: Callable[[Sequence[Mapping[str, Any]]], list[float]]
) -> dict[int, float]:
    """Returns Kendall's tau-b of preview and final score for each level, the mean over prompts.

    `rows` are those of candidates.jsonl after `walk` with keep 1, `values` what those of one prompt
    and level are ranked by; prompts whose values are all equal say nothing and are left out.
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
    for (level, _), outcomes in pairs.items():
        previews, finals = zip(*outcomes, strict=True)
        tau = float(stats.kendalltau(values(previews), values(finals)).statistic)
        if not math.isnan(tau):
            taus.setdefault(level, []).append(tau)
    return {level: sum(of_level) / len(of_level) for level, of_level in taus.items()}


ALGORITHM = Algorithm(
    halving, HalvingConfig, form="parts", least_nfe=least_nfe, levels=pruning_levels
)
