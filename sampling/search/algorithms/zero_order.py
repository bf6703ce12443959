"""Zero-order search: a pivot noise, N neighbours of it, the best becomes the pivot; repeat.

Ma et al. 2025, section 3.1. Where no neighbour is better the pivot stays; it is never run or scored
again.
"""

from blackpoint.sampling.search.algorithm_configs import ZeroOrderConfig
from blackpoint.sampling.search.trial import Neighbour, Problem, Search, Seeded, Trial


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
