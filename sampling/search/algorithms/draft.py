"""Drafts: many noises run in a few steps, the best of them in all.

A draft is the same noise sampled in k << S steps on their own grid. Its image is poor and its score
low, but in the order of noises it is often near to that of the whole run. With a budget B, c rows a
step and m whole runs,

    N = (B - m S c) / (k c)

noises are drafted, and the best m of them run in all S steps; the winner is the best of these
images, a draft never. Half of the budget for each part is a robust share.

How well drafts rank depends on model and verifier, so Kendall's tau of draft and final score is
measured beforehand at k = S/12, S/8, S/6 and S/4: the fewest steps of a good tau are taken, else
the most. Where the lower 95 % bound of the mean tau is too low, or the budget pays for no more
drafts than whole runs, it is best-of-N.

With `share_new` below 1 the rest of the drafts are neighbours (cosine .9) of the best four.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.problem import (
    UNKNOWN,
    Algorithm,
    Calibration,
    Correlation,
    Goal,
    Neighbour,
    Outcome,
    Problem,
    Search,
    Seeded,
    Trial,
)

if TYPE_CHECKING:
    from blackpoint.sampling.search.config import SearchOptions

PARTS_OF_A_RUN = (12, 8, 6, 4)
"""A draft may have the sampling steps over one of these."""
GOOD_KENDALL = 0.6
NUM_PARENTS, COSINE = 4, 0.9
FEWEST_STEPS = 4
"""Of a whole run; a draft has at least 2, and at most half of its steps."""


@dataclass
class DraftConfig:
    """Drafts in few steps, of which the best are run in all."""

    draft_steps: int | None = None
    """Sampling steps of a draft; measured among num_steps / 12, 8, 6 and 4 if not set."""
    num_whole: int | None = None
    """Whole runs; as many as half of the budget pays for, at least 2, if not set."""
    share_new: float = 1.0
    """Share of the drafts that are new noises; the others are neighbours of the best 4 of them."""
    min_kendall: float = 0.2
    """Least lower 95 % bound of the rank correlation of draft and final score; best-of-N below."""
    calibration_prompts: int = 16
    """Prompts, the first ones, on which that correlation is measured, beside the budget."""
    calibration_candidates: int = 8
    """Whole runs of each of them for the measurement."""

    def __post_init__(self) -> None:
        check_ranges(self, "draft.", draft_steps=">= 1", num_whole=">= 2", share_new="> 0 and <= 1")
        check_ranges(self, "draft.", min_kendall=">= -1 and <= 1", calibration_prompts=">= 1")
        check_ranges(self, "draft.", calibration_candidates=">= 2")


def looks(config: DraftConfig, num_steps: int) -> list[int]:
    """Returns the steps of drafts that are measured, rising."""
    if config.draft_steps is not None:
        return [config.draft_steps]
    return sorted({_clipped(num_steps / part, num_steps) for part in PARTS_OF_A_RUN})


def steps_of_drafts(
    config: DraftConfig, num_steps: int, kendall: Mapping[int, Correlation] | None
) -> int | None:
    """Returns the steps of a draft, None where drafts rank too badly; unmeasured S / 8 or 3."""
    if kendall is None:
        return config.draft_steps or _clipped(max(3, num_steps // 8), num_steps)
    taus = {steps: kendall.get(steps, UNKNOWN) for steps in looks(config, num_steps)}
    usable = [steps for steps, tau in taus.items() if tau.low >= config.min_kendall]
    good = [steps for steps in usable if taus[steps].value >= GOOD_KENDALL]
    return good[0] if good else max(usable, default=None)


def _clipped(steps: float, num_steps: int) -> int:
    return min(max(round(steps), 2), num_steps // 2)


def draft(problem: Problem, config: DraftConfig) -> Search:
    """Drafts, ranks, and runs the best; best-of-N where drafts are of no use."""
    num_steps, full = problem.grid.num_steps, problem.full_cost
    steps = steps_of_drafts(config, num_steps, problem.kendall)
    num_whole = config.num_whole or max(2, problem.budget_nfe // (2 * full))
    left = problem.budget_nfe - num_whole * full
    num_drafts = left // problem.cost(0, steps, steps) if steps else 0
    if steps is None or num_drafts <= num_whole:
        yield from random_search(problem, RandomSearchConfig())
        if steps is None:
            return "best-of-N: drafts do not tell how whole runs will rank"
        return f"best-of-N: the budget pays for no more than {num_whole} drafts of {steps} steps"
    num_new = math.ceil(config.share_new * num_drafts)
    seeds = [problem.draw_seed("candidate", number) for number in range(num_drafts)]
    drafts: list[Outcome] = yield [
        Trial(0, number, Seeded(seed), steps, "draft", seed, num_steps=steps)
        for number, seed in enumerate(seeds[:num_new])
    ]
    if num_new < num_drafts:
        parents = problem.best_first(drafts)[:NUM_PARENTS]
        drafts += yield [
            _neighbour(parents[number % len(parents)].trial, number, seeds[number], steps)
            for number in range(num_new, num_drafts)
        ]
    number, round_number = num_drafts, 1 + (num_new < num_drafts)
    best = [outcome.trial for outcome in problem.best_first(drafts)[:num_whole]]
    yield [
        Trial(round_number, number + k, one.start, num_steps, "final", one.seed, one.candidate)
        for k, one in enumerate(best)
    ]
    return ""


def _neighbour(parent: Trial, number: int, seed: int, steps: int) -> Trial:
    start = Neighbour(parent.origin, seed, COSINE)
    return Trial(1, number, start, steps, "draft", seed, parent.candidate, steps)


def walk(problem: Problem, looks: Sequence[int], count: int) -> Search:
    """Runs `count` noises as drafts of every number of steps, and whole."""
    seeds = [problem.draw_seed("candidate", number) for number in range(count)]
    for round_number, steps in enumerate((*looks, problem.grid.num_steps)):
        goal: Goal = "draft" if round_number < len(looks) else "final"
        trials = []
        for index, seed in enumerate(seeds):
            number, parent = round_number * count + index, (round_number - 1) * count + index
            about = {"parent": parent} if round_number else {}
            about |= {"num_steps": steps} if goal == "draft" else {}
            trials.append(Trial(round_number, number, Seeded(seed), steps, goal, seed, **about))
        yield trials


def choice(config: DraftConfig, num_steps: int, kendall: Mapping[int, Correlation]) -> str:
    """Says which drafts a search makes."""
    steps = steps_of_drafts(config, num_steps, kendall)
    return f"drafts of {steps} steps" if steps else "no drafts, best-of-N"


def check(search: "SearchOptions", config: DraftConfig) -> None:
    """Raises UserError where a run in fewer steps is none, or is another one."""
    if config.draft_steps is not None and config.draft_steps >= search.num_steps:
        raise UserError(
            f"draft.draft_steps={config.draft_steps} must be less than num_steps="
            f"{search.num_steps}; leave it out to have it measured"
        )
    if SAMPLERS[search.sampler].fresh_noise(search.eta):
        raise UserError(
            f"sampler={search.sampler}, eta={search.eta}: the noise of the steps makes another "
            "image of a draft's starting noise, so algorithm=draft needs a deterministic sampler; "
            "use ddim without eta"
        )


ALGORITHM = Algorithm(
    draft,
    DraftConfig,
    form="parts",
    check=check,
    least_steps=FEWEST_STEPS,
    calibration=Calibration(looks, walk, choice),
    completes_one_by_one=True,
)
