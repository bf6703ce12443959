"""Zero-order search: a pivot noise, N neighbours of it, the best becomes the pivot; repeat.

Ma et al. 2025, section 3.1. Where no neighbour is better the pivot stays; it is never run or scored
again.
"""

from dataclasses import dataclass

from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.search.problem import Algorithm, Neighbour, Problem, Search, Seeded, Trial


@dataclass
class ZeroOrderConfig:
    """Zero-order search, ZO-N."""

    num_neighbours: int = 2
    """Neighbours of the pivot per round, N; the authors have 2 for text-to-image, 4 on ImageNet."""
    cosine: float = 0.95
    """Cosine of the angle between a neighbour and the pivot."""

    def __post_init__(self) -> None:
        check_ranges(self, "zero_order.", num_neighbours=">= 1", cosine=">= -1 and < 1")


def zero_order(problem: Problem, config: ZeroOrderConfig) -> Search:
    """Spends the budget round by round; the last may have fewer neighbours."""
    stop, seed = problem.grid.num_steps, problem.draw_seed("candidate", 0)
    [best] = yield [Trial(0, 0, Seeded(seed), stop, "final", seed)]
    left, number, round_number = problem.budget_nfe - best.nfe, 1, 1
    while left >= problem.full_cost:
        count = min(config.num_neighbours, left // problem.full_cost)
        pivot = best.trial.start
        assert isinstance(pivot, Seeded | Neighbour)
        trials = []
        for candidate in range(number, number + count):
            seed = problem.draw_seed("candidate", candidate)
            start = Neighbour(pivot, seed, config.cosine)
            parent = best.trial.candidate
            trials.append(Trial(round_number, candidate, start, stop, "final", seed, parent))
        outcomes = yield trials
        best = problem.best_first([best, *outcomes])[0]
        left -= sum(outcome.nfe for outcome in outcomes)
        number, round_number = number + count, round_number + 1


ALGORITHM = Algorithm(zero_order, ZeroOrderConfig, form="whole")
