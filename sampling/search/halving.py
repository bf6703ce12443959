"""Successive halving on previews: many noises start, the worse share is dropped at each level.

Jamieson and Talwalkar 2016, with the verifier's score of the x0-prediction in place of a partial
training's. A preview that does not tell what the final score will be prunes at random, so a level
prunes only where the rank correlation (Kendall's tau) of preview and final score, measured
beforehand on whole runs, is high enough (`measured_levels`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sampling.errors import UserError
from sampling.search.trial import Outcome, Problem, Search, Seeded, Trial


@dataclass
class HalvingConfig:
    """Successive halving."""

    levels: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Where to look, in shares of the sampling steps."""
    keep: float = 0.5
    """Share of the candidates that stays at each of them."""
    min_kendall: float = 0.3
    """Least rank correlation of preview and final score at which a level prunes."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not rising or not 0 < self.levels[0] <= self.levels[-1] < 1:
            raise UserError(f"levels={self.levels} must be shares between 0 and 1, rising")
        if not 0 < self.keep < 1:
            raise UserError(f"keep={self.keep} must lie between 0 and 1")
        if not -1 <= self.min_kendall <= 1:
            raise UserError(f"min_kendall={self.min_kendall} must lie in [-1, 1]")


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


def halving(
    problem: Problem, config: HalvingConfig, kendall: Mapping[int, float] | None = None
) -> Search:
    """Starts as many noises as the budget completes; without pruning levels it is best-of-N."""
    last = problem.grid.num_steps
    levels = pruning_levels(config, last, kendall)
    count = num_candidates(problem, levels, config.keep)
    seeds = [problem.draw_seed("candidate", number) for number in range(count)]
    runs: list[tuple[int, int, Outcome | None]] = [
        (number, seed, None) for number, seed in enumerate(seeds)
    ]
    for round_number, level in enumerate((*levels, last)):
        trials = [
            Trial(
                round_number,
                number,
                Seeded(seed) if before is None or before.state is None else before.state,
                level,
                "final" if level == last else "preview",
                seed,
                None if before is None else number,
            )
            for number, seed, before in runs
        ]
        outcomes = yield trials
        kept = problem.best_first(outcomes)[: max(1, round(len(outcomes) * config.keep))]
        runs = [(kept_one.trial.candidate, kept_one.trial.seed, kept_one) for kept_one in kept]
