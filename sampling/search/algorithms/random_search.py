"""Random search (best-of-N): N independent noises, full sampling, keep the best.

Ma et al. 2025, section 3.1. Candidate k of prompt i starts from a seed that any tool re-makes.
"""

from dataclasses import dataclass

from blackpoint.sampling.search.problem import Algorithm, Problem, Search, Seeded, Trial


@dataclass
class RandomSearchConfig:
    """Best-of-N."""

    first_seed: int | None = None
    """Seeds are first_seed, first_seed + 1, ...; not set: drawn from the run's seed and prompt."""


def random_search(problem: Problem, config: RandomSearchConfig) -> Search:
    """Spends the budget on whole images; one round."""
    seeds = [
        problem.draw_seed("candidate", number)
        if config.first_seed is None
        else config.first_seed + number
        for number in range(problem.budget_nfe // problem.full_cost)
    ]
    stop = problem.grid.num_steps
    yield [Trial(0, number, Seeded(seed), stop, "final", seed) for number, seed in enumerate(seeds)]


ALGORITHM = Algorithm(random_search, RandomSearchConfig, form="whole", grows=True)
