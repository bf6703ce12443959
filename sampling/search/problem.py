"""The one search problem: an algorithm's requests and their results.

An algorithm is a generator for one prompt. It yields rounds of trials, each a run from a start to a
level of the grid, and is sent their outcomes in the same order; it neither runs a network nor sees
an image. So the driver is free to put trials of many prompts into one batch, to split them among
processes and, after a kill, to answer from its records what was paid for already.

    def algorithm(problem: Problem) -> Search:
        outcomes = yield [Trial(...), ...]

Budgets are in NFE, which `Problem.cost` tells before anything is run. An algorithm's file ends in
what it declares (`Algorithm`), and has a line in the table of sampling/search/config.py; so neither
it nor this file imports torch at the top, and the help of the verb is instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.search.costs import Ledger
from blackpoint.sampling.verifiers.kind import RunForm

if TYPE_CHECKING:
    from torch import Tensor

Goal = Literal["final", "preview", "gradient"]
"""gradient: a whole run like final, and the gradient of its score at the noise."""


@dataclass(frozen=True)
class Seeded:
    """The noise of a seed, as diffusers draws it from torch.Generator("cpu")."""

    seed: int

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Returns unit noise (C, H, W)."""
        from blackpoint.sampling.noise import seeded_noise

        return seeded_noise(self.seed, shape)


@dataclass(frozen=True)
class Neighbour:
    """A noise at the angle arccos(cosine) of its parent, with the parent's norm.

    y = |x| (c u + sqrt(1 - c^2) w),  u = x / |x|,  w the part of fresh noise across u, normalised
    (an implementation of Ma et al. 2025, zero-order search, by one of its authors).
    """

    parent: Noise
    seed: int
    cosine: float

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Returns the noise (C, H, W)."""
        x = self.parent.noise(shape).double()
        fresh = Seeded(self.seed).noise(shape).double()
        u = x / x.norm()
        across = fresh - (fresh * u).sum() * u
        w = across / across.norm()
        return (x.norm() * (self.cosine * u + math.sqrt(1 - self.cosine**2) * w)).float()


@dataclass(frozen=True)
class Given:
    """A noise that no seed re-makes."""

    tensor: Tensor  # (C, H, W)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Returns the noise; it must have the shape."""
        assert tuple(self.tensor.shape) == tuple(shape)
        return self.tensor


Noise = Seeded | Neighbour | Given


@dataclass(frozen=True)
class Renoised:
    """A state taken back to a noisier level by the forward process, with the noise of a seed."""

    state: SampleState  # of one sample, (1, C, H, W)
    step: int
    seed: int


@dataclass(frozen=True)
class Trial:
    """One run that is asked for; `candidate` numbers those of a prompt, in the order of asking."""

    round: int
    candidate: int
    start: Noise | SampleState | Renoised
    stop: int
    goal: Goal
    seed: int
    """Names the noise of a stochastic sampler's steps, and the start where it is Seeded."""
    parent: int | None = None

    @property
    def origin(self) -> Noise:
        """The noise that the run began with; that of its seed where it continues another's run."""
        return self.start if isinstance(self.start, Noise) else Seeded(self.seed)

    @property
    def first_step(self) -> int:
        """The level that the run starts from."""
        return 0 if isinstance(self.start, Noise) else self.start.step


@dataclass(frozen=True)
class Outcome:
    """Result of a trial.

    `score` is rounded to 1e-4: of the image, or of the preview of x0, NaN where it is not finite;
    of several verifiers it is the weighted sum, and `scores` has each. `state` is of one sample,
    (1, C, H, W), on the CPU; None for goal "final"; for "gradient" that is its x, and the noise x0.
    """

    trial: Trial
    score: float
    nfe: int
    state: SampleState | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> SampleState:
        """The state, of a run that is no final candidate."""
        assert self.state is not None
        return self.state


@dataclass(frozen=True)
class Result:
    """An outcome, and the image where it is a whole run's, on the CPU."""

    outcome: Outcome
    image: Tensor | None = None  # (3, H, W)
    seconds: float = 0.0
    spent: Ledger = field(default_factory=Ledger)


Search = Generator[list[Trial], list[Outcome], Any]
"""Its return value, if any, is a note on how it ended."""
Ranking = Callable[[Sequence[Outcome]], Sequence[float]]
"""Values of the candidates of a group, by which they are compared; the higher the better."""


def by_score(outcomes: Sequence[Outcome]) -> list[float]:
    """Ranks by the score alone."""
    return [outcome.score for outcome in outcomes]


@dataclass(frozen=True)
class Problem:
    """One prompt's search: its number, the run's seed, the grid, and the budget."""

    prompt_index: int
    seed: int
    grid: SamplingGrid
    cost: Callable[[int, int], int]
    """NFE of a run from level a to level b, both branches of guidance counted."""
    budget_nfe: int
    ranking: Ranking = by_score
    gradient_cost: int = 0
    """NFE of a run with its gradient, for an algorithm of the form "gradient"."""
    kendall: Mapping[int, float] | None = None
    """Rank correlation of previews and final scores by level, where the algorithm has it measured
    beforehand."""

    def best_first(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Sorts outcomes, the best first; ties go to the lower candidate, rejected ones go last.

        Rejected are those whose score, or whose value in the ranking, is not finite.
        """
        values = self.ranking(outcomes)
        keys = [
            (
                -value if math.isfinite(outcome.score) and math.isfinite(value) else math.inf,
                outcome.trial.candidate,
            )
            for outcome, value in zip(outcomes, values, strict=True)
        ]
        order = sorted(range(len(outcomes)), key=keys.__getitem__)
        return [outcomes[index] for index in order]

    @property
    def full_cost(self) -> int:
        """NFE of one image."""
        return self.cost(0, self.grid.num_steps)

    def draw_seed(self, *parts: int | str) -> int:
        """Returns a seed below 2^31 that is recorded and works in every tool."""
        from blackpoint.sampling.noise import derive_seed

        return derive_seed(self.seed, self.prompt_index, *parts) >> 32


@dataclass(frozen=True)
class Algorithm:
    """Declaration of a search algorithm; `config` holds its settings, a section of the verb's."""

    start: Callable[[Problem, Any], Search]
    config: type
    form: RunForm
    check: Callable[[Any, Any], None] = lambda search, config: None
    """Raises UserError for a search (`SearchOptions`) that it cannot make with its settings."""
    least_nfe: Callable[[Problem, Any], int] = lambda problem, config: (
        problem.gradient_cost or problem.full_cost
    )
    """NFE of its smallest search."""
    levels: Callable[[Any, int, Mapping[int, float] | None], list[int]] | None = None
    """(config, sampling steps, rank correlations by level) -> the levels where it chooses by
    previews, all of them without correlations. Where it has them, these are measured beforehand."""

    @property
    def has_plain_first(self) -> bool:
        """Whether its first candidate is the plain image of its seed."""
        return self.form in ("whole", "gradient")

    @property
    def is_reproducible(self) -> bool:
        """Whether the seed of a candidate that starts from one re-makes it, with a deterministic
        sampler."""
        return self.form in ("whole", "parts")
