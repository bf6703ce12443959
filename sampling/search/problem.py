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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.search.costs import Ledger
from blackpoint.sampling.verifiers.kind import RunForm

if TYPE_CHECKING:
    from torch import Tensor

    from blackpoint.sampling.pipelines.painter import Draw

Goal = Literal["final", "preview", "draft", "gradient"]
"""draft: a whole run in fewer steps, which tells which noises deserve all of them and never wins.
gradient: a whole run like final, and the gradient of its score at the noise."""


@dataclass(frozen=True)
class Seeded:
    """The noise of a seed, as diffusers draws it from torch.Generator("cpu")."""

    seed: int

    def noise(self, draw: Draw) -> Tensor:
        """Returns unit noise as the model draws it, (C, H, W) or in a layout of its own."""
        return draw([self.seed])[0]


@dataclass(frozen=True)
class Neighbour:
    """A noise at the angle arccos(cosine) of its parent, with the parent's norm.

    y = |x| (c u + sqrt(1 - c^2) w),  u = x / |x|,  w the part of fresh noise across u, normalised
    (an implementation of Ma et al. 2025, zero-order search, by one of its authors).
    """

    parent: Noise
    seed: int
    cosine: float

    def noise(self, draw: Draw) -> Tensor:
        """Returns the noise, in the layout of its parent."""
        x = self.parent.noise(draw).double()
        fresh = Seeded(self.seed).noise(draw).double()
        u = x / x.norm()
        across = fresh - (fresh * u).sum() * u
        w = across / across.norm()
        return (x.norm() * (self.cosine * u + math.sqrt(1 - self.cosine**2) * w)).float()


@dataclass(frozen=True)
class Given:
    """A noise that no seed re-makes."""

    tensor: Tensor  # (C, H, W)

    def noise(self, draw: Draw) -> Tensor:
        """Returns the noise."""
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
    num_steps: int | None = None
    """Sampling steps of its own grid, whose levels it counts in; None: those of the search."""

    @property
    def may_win(self) -> bool:
        """Whether its image is a candidate for the winner."""
        return self.goal in ("final", "gradient")

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
    (1, C, H, W), on the CPU; None for whole runs; for "gradient" that is its x, and the noise x0.
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
    previews: Mapping[int, Tensor] = field(default_factory=dict)
    """x0-predictions of its run by level, decoded, on the CPU, where previews are shown."""


Search = Generator[list[Trial], list[Outcome], Any]
"""Its return value, if any, is a note on how it ended."""
Ranking = Callable[[Sequence[Outcome]], Sequence[float]]
"""Values of the candidates of a group, by which they are compared; the higher the better."""


def by_score(outcomes: Sequence[Outcome]) -> list[float]:
    """Ranks by the score alone."""
    return [outcome.score for outcome in outcomes]


class Correlation(NamedTuple):
    """Kendall's tau of early and final scores within prompts."""

    value: float
    """Mean over prompts."""
    low: float
    """One-sided lower 95 % bound of that mean; -1 where there are too few prompts for one."""


UNKNOWN = Correlation(-1.0, -1.0)
"""Of prompts whose scores are all equal."""


@dataclass(frozen=True)
class Problem:
    """One prompt's search: its number, the run's seed, the grid, and the budget."""

    prompt_index: int
    seed: int
    grid: SamplingGrid
    cost: Callable[..., int]
    """(a, b, num_steps=None) -> NFE of a run from level a to level b, both branches of guidance
    counted, on the search's grid or on that of another number of steps."""
    budget_nfe: int
    ranking: Ranking = by_score
    gradient_cost: int = 0
    """NFE of a run with its gradient, for an algorithm of the form "gradient"."""
    target: float | None = None
    """Score at which the search ends."""
    kendall: Mapping[int, Correlation] | None = None
    """Rank correlation of early and final scores by look, where the algorithm has it measured
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
class Tilt:
    """How the fresh noise of a stochastic sampler's steps is tilted towards a higher score."""

    strength: float
    """c of z' = sqrt(1 - c^2) z + c w (sampling/search/gradients.py)."""
    gradient: Literal["x0", "x_t"] = "x0"
    """Of the score at the x0-prediction, or through the network at the state that it reads."""
    sums_scores: bool = True
    """Of several verifiers: the gradient of their weighted sum, or the weighted sum of gradients
    of norm 1, which no verifier's scale can dominate."""


@dataclass(frozen=True)
class Calibration:
    """How an algorithm measures, before a search, how its early scores rank whole runs.

    Its config has `calibration_prompts` and `calibration_candidates`, whole runs of each of them.
    """

    looks: Callable[[Any, int], list[int]]
    """(config, sampling steps) -> the looks: levels of previews, or steps of drafts."""
    walk: Callable[[Problem, Sequence[int], int], Search]
    """(problem, looks, count) -> `count` whole runs, each the child of its scores at the looks."""
    choice: Callable[[Any, int, Mapping[int, Correlation]], str]
    """(config, sampling steps, correlations by look) -> what a search does with them, in words."""


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
    least_steps: int = 1
    """Sampling steps that it needs, to look at runs before they end."""
    calibration: Calibration | None = None
    """Where its choices rest on early scores."""
    tilt: Callable[[Any, Any], Tilt | None] | None = None
    """(search, settings) -> how its runs' step noise is tilted; None where it never is."""
    completes_one_by_one: bool | None = None
    """Whether its images may be run one after another, until one reaches the target; those of runs
    that are whole from the start, if None."""
    grows: bool = False
    """Whether the candidates of a smaller budget are the first of a larger one's."""
    former: Mapping[str, Any] = field(default_factory=dict)
    """Settings that had other defaults once, and those, with which folders begun so go on."""

    @property
    def takes_target(self) -> bool:
        """Whether it can end with the first image that reaches a target."""
        by_form = self.form in ("whole", "gradient")
        return by_form if self.completes_one_by_one is None else self.completes_one_by_one

    @property
    def has_plain_first(self) -> bool:
        """Whether its first candidate is the plain image of its seed."""
        return self.form in ("whole", "gradient") and self.tilt is None

    @property
    def is_reproducible(self) -> bool:
        """Whether the seed of a candidate that starts from one re-makes it, with a deterministic
        sampler."""
        return self.form in ("whole", "parts")
