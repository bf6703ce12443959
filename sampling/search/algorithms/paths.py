"""Search over paths: N samples are taken back a little, M ways each, and the best N go on.

Ma et al. 2025, section 3.1, Paths-N. From each of N survivors at noise level sigma, M fresh
re-noisings by delta_f, each denoised by delta_b > delta_f, so that a round gains delta_b - delta_f;
x0-predictions are verified and the best N kept, until the noise is used up. Their levels are times
tau of a linear flow, x = (1 - tau) x0 + tau eps; here a tau is the level of the sampling grid whose
sigma / (sigma + alpha) is nearest. The survivors of the last round are sampled to the end.

A round goes nearly the whole way, so on a fine grid few fit a budget, or none. What no round fits
is spent on more noises at the start, of which the best N go on.
"""

from dataclasses import dataclass

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.grid import SamplingGrid
from blackpoint.sampling.search.problem import (
    Algorithm,
    Outcome,
    Problem,
    Renoised,
    Search,
    Seeded,
    Trial,
)


@dataclass
class PathsConfig:
    """Search over paths, Paths-N."""

    num_paths: int = 2
    """Survivors of a round, N."""
    num_expansions: int = 4
    """Re-noisings of each survivor, M."""
    sigma: float = 0.11
    """Time tau that the first N noises are denoised to, and the search begins at."""
    delta_f: float = 0.78
    """tau added by a re-noising; less where the start would be passed."""
    delta_b: float = 0.81
    """tau removed after it; more than delta_f."""
    fill: bool = True
    """Start more noises with what no round fits; else it stays unspent."""

    def __post_init__(self) -> None:
        check_ranges(self, "paths.", num_paths=">= 1", num_expansions=">= 1", sigma="> 0 and < 1")
        if not 0 < self.delta_f < self.delta_b:
            raise UserError(
                f"delta_f={self.delta_f} and delta_b={self.delta_b}: each round must gain, so "
                "0 < delta_f < delta_b"
            )


def level_of(grid: SamplingGrid, tau: float) -> int:
    """Returns the level whose sigma / (sigma + alpha) is nearest to tau."""
    taus = [s / (s + a) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    return min(range(len(taus)), key=lambda level: abs(taus[level] - tau))


def rounds_of(grid: SamplingGrid, config: PathsConfig) -> list[tuple[int, int, int]]:
    """Returns (from, re-noised, denoised) levels of each round; the first is from tau sigma.

    Round k goes from sigma - k (delta_b - delta_f). On a coarse grid several have the same levels;
    none reaches clean data, which nothing is left to choose from.
    """
    rounds, tau, gain = [], config.sigma, config.delta_b - config.delta_f
    while tau > 0:
        after = tau - gain
        level, forth = _noisy_level(grid, tau), _noisy_level(grid, max(after, 0.0))
        back = min(level_of(grid, min(tau + config.delta_f, 1.0)), level)
        rounds.append((level, back, forth))
        tau = after
    return rounds


def _noisy_level(grid: SamplingGrid, tau: float) -> int:
    """Returns the level nearest to tau that a step leads to and a step leads on from."""
    return min(max(level_of(grid, tau), 1), grid.num_steps - 1)


def unspent(problem: Problem, config: PathsConfig, num_starts: int) -> tuple[int, int]:
    """Returns the number of rounds that fit, and the NFE left when their survivors are sampled."""
    cost, last = problem.cost, problem.grid.num_steps
    reached, kept, num_rounds = _noisy_level(problem.grid, config.sigma), num_starts, 0
    left = problem.budget_nfe - num_starts * cost(0, reached)
    for _, back, forth in rounds_of(problem.grid, config):
        price = kept * config.num_expansions * cost(back, forth)
        if left < price + kept * cost(forth, last):
            break
        left, num_rounds, reached = left - price, num_rounds + 1, forth
        kept = min(config.num_paths, kept * config.num_expansions)
    return num_rounds, left - kept * cost(reached, last)


def paths(problem: Problem, config: PathsConfig) -> Search:
    """Runs whole rounds while the budget allows it and completes the best survivors."""
    grid, cost, last = problem.grid, problem.cost, problem.grid.num_steps
    first = _noisy_level(grid, config.sigma)
    num_kept = min(config.num_paths, problem.budget_nfe // problem.full_cost)
    num_rounds, spare = unspent(problem, config, num_kept)
    count = num_kept + max(0, spare // cost(0, first)) * config.fill
    seeds = [problem.draw_seed("candidate", number) for number in range(count)]
    survivors = yield [
        Trial(0, number, Seeded(seed), first, "preview", seed) for number, seed in enumerate(seeds)
    ]
    left = problem.budget_nfe - sum(outcome.nfe for outcome in survivors)
    best = problem.best_first(survivors)[:num_kept]
    survivors = sorted(best, key=lambda outcome: outcome.trial.candidate)
    number, round_number = count, 1
    for level, back, forth in rounds_of(grid, config)[:num_rounds]:
        trials = []
        for survivor in survivors:
            assert survivor.reached.step == level
            for _ in range(config.num_expansions):
                seed = problem.draw_seed("candidate", number)
                start = Renoised(survivor.reached, back, seed)
                parent = survivor.trial.candidate
                trials.append(Trial(round_number, number, start, forth, "preview", seed, parent))
                number += 1
        outcomes: list[Outcome] = yield trials
        left -= sum(outcome.nfe for outcome in outcomes)
        survivors = problem.best_first(outcomes)[: config.num_paths]
        round_number += 1
    finals = []
    for survivor in problem.best_first(survivors):
        price = cost(survivor.reached.step, last)
        if left < price:
            break
        left -= price
        seed, parent = survivor.trial.seed, survivor.trial.candidate
        finals.append(Trial(round_number, number, survivor.reached, last, "final", seed, parent))
        number += 1
    yield finals
    return "" if num_rounds else f"no round fits the budget: the best of {count} starts"


ALGORITHM = Algorithm(paths, PathsConfig, form="mixed", least_steps=2, former={"fill": False})
