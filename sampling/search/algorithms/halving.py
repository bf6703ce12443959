"""Successive halving on previews: many noises start, the worse share is dropped at each level.

Jamieson and Talwalkar 2016, with the verifier's score of the x0-prediction in place of a partial
training's. A preview that does not tell what the final score will be prunes at random, so Kendall's
tau of preview and final score is measured beforehand on whole runs, and its one-sided lower 95 %
bound L decides at each level:

    L < .3       nothing is dropped
    L < .5       .7 stay
    L < .75      .5 stay
    otherwise    .35 stay

Where that starts no more noises than best-of-N at the same cost, it is best-of-N. On the rank
correlations and losses that TTSnap (2511.22242) measured on FLUX.1-dev and SDXL this is never worse
than best-of-N; three levels that keep half by the mean of 8 prompts are
(tests/test_search_halving.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from blackpoint.data.files.rules import check_ranges, require
from blackpoint.sampling.search.problem import (
    UNKNOWN,
    Algorithm,
    Calibration,
    Correlation,
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
    keep: float | None = None
    """Share of the candidates that stays at each of them; from the rank correlation there, .7 to
    .35, if not set."""
    min_kendall: float = 0.3
    """Least rank correlation of preview and final score at which a level prunes."""
    guard: Literal["bound", "mean"] = "bound"
    """The rank correlation that decides: the lower 95 % bound of its mean over prompts, or the
    mean."""
    calibration_prompts: int = 16
    """Prompts, the first ones, on which that correlation is measured, beside the budget."""
    calibration_candidates: int = 8
    """Whole runs of each of them for the measurement."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        are_shares = self.levels and rising and 0 < self.levels[0] <= self.levels[-1] < 1
        require(are_shares, "halving.levels", self.levels, "shares between 0 and 1, rising")
        check_ranges(self, "halving.", calibration_prompts=">= 1", calibration_candidates=">= 2")
        check_ranges(self, "halving.", keep="> 0 and < 1", min_kendall=">= -1 and <= 1")


KEEP_FROM = ((0.75, 0.35), (0.5, 0.5), (-1.0, 0.7))
"""Least rank correlation, and the share that stays."""
KEEP_UNMEASURED = 0.5
FORMER = {"keep": 0.5, "guard": "mean", "calibration_prompts": 8}


def looks(config: HalvingConfig, num_steps: int) -> list[int]:
    """Returns the levels of the config."""
    nearest = (round(share * num_steps) for share in config.levels)
    return sorted({min(max(level, 1), num_steps - 1) for level in nearest})


def shares(
    config: HalvingConfig, num_steps: int, kendall: Mapping[int, Correlation] | None
) -> dict[int, float]:
    """Returns the levels that prune, and the share that stays at each; unmeasured, all of them."""
    levels = looks(config, num_steps)
    if kendall is None:
        return dict.fromkeys(levels, config.keep or KEEP_UNMEASURED)
    taus = {level: kendall.get(level, UNKNOWN) for level in levels}
    decisive = {k: tau.low if config.guard == "bound" else tau.value for k, tau in taus.items()}
    return {
        level: config.keep or next(keep for least, keep in KEEP_FROM if tau >= least)
        for level, tau in decisive.items()
        if tau >= config.min_kendall
    }


def num_candidates(problem: Problem, pruned: Mapping[int, float]) -> int:
    """Returns how many noises can start so that the survivors complete inside the budget."""
    count = 0
    while spent(problem, pruned, count + 1) <= problem.budget_nfe:
        count += 1
    return count


def spent(problem: Problem, pruned: Mapping[int, float], count: int) -> int:
    """Returns the NFE of `count` noises of which shares stay at levels."""
    total, before = 0, 0
    for level in (*pruned, problem.grid.num_steps):
        total += count * problem.cost(before, level)
        count, before = _kept(count, pruned.get(level, 1.0)), level
    return total


def _kept(count: int, keep: float) -> int:
    return max(1, round(count * keep))


def plan(problem: Problem, config: HalvingConfig) -> tuple[dict[int, float], int]:
    """Returns the shares that stay by level, none for best-of-N, and how many noises start."""
    pruned = shares(config, problem.grid.num_steps, problem.kendall)
    count, best_of_n = num_candidates(problem, pruned), problem.budget_nfe // problem.full_cost
    if problem.kendall is not None and config.guard == "bound" and count <= best_of_n:
        return {}, best_of_n
    return pruned, count


def halving(problem: Problem, config: HalvingConfig) -> Search:
    """Starts as many noises as the budget completes; without pruning levels it is best-of-N."""
    pruned, count = plan(problem, config)
    yield from walk(problem, pruned, count)
    return "" if pruned else "best-of-N: no level prunes"


def least_nfe(problem: Problem, config: HalvingConfig) -> int:
    """Returns the NFE of one noise that is looked at wherever it may be."""
    return spent(problem, shares(config, problem.grid.num_steps, None), 1)


def walk(problem: Problem, pruned: Mapping[int, float], count: int) -> Search:
    """Runs `count` noises from level to level and keeps a share at each; 1 keeps all of them.

    A continuation is a candidate of its own, whose parent it continues.
    """
    last, number = problem.grid.num_steps, 0
    seeds = [problem.draw_seed("candidate", index) for index in range(count)]
    kept: list[Outcome] = []
    for round_number, level in enumerate((*pruned, last)):
        goal: Goal = "final" if level == last else "preview"
        trials = []
        for index in range(len(kept) or count):
            seed = kept[index].trial.seed if kept else seeds[index]
            start = kept[index].reached if kept else Seeded(seed)
            parent = kept[index].trial.candidate if kept else None
            trials.append(Trial(round_number, number, start, level, goal, seed, parent))
            number += 1
        outcomes = yield trials
        best = problem.best_first(outcomes)[: _kept(len(outcomes), pruned.get(level, 1.0))]
        kept = sorted(best, key=lambda outcome: outcome.trial.candidate)


def choice(config: HalvingConfig, num_steps: int, kendall: Mapping[int, Correlation]) -> str:
    """Says where a search prunes."""
    pruned = shares(config, num_steps, kendall)
    return (
        "; ".join(f"{keep:g} stay after {k}" for k, keep in pruned.items()) or "nothing is pruned"
    )


ALGORITHM = Algorithm(
    halving,
    HalvingConfig,
    form="parts",
    least_nfe=least_nfe,
    least_steps=2,
    calibration=Calibration(
        looks,
        lambda problem, looks, count: walk(problem, dict.fromkeys(looks, 1.0), count),
        choice,
    ),
    former=FORMER,
)
