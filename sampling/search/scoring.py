"""The verifiers of a search: the states of a run that they read, and their scores.

A look at a run is scored by the verifiers that cover its level, if there are any, else by those
without levels: a reward that is trained on previews ranks previews, and the final image's ranks
images (TTSnap 2025, arXiv 2511.22242). Levels are shares of the sampling steps in the config, or
the log SNR that a verifier declares.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import SCORE_DECIMALS
from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.pipelines.painter import Levels
from blackpoint.sampling.verifiers.verifier import (
    Images,
    Latents,
    TrajectoryVerifier,
    Verifier,
    checked_scores,
    takes_latents,
)

AnyVerifier = Verifier | TrajectoryVerifier


@dataclass
class Trace:
    """States kept of a batch's runs on their way."""

    readings: dict[int, Tensor] = field(default_factory=dict)
    """x0-predictions by step."""
    levels: dict[int, Tensor] = field(default_factory=dict)
    """Latents by level."""
    shown: dict[int, Tensor] = field(default_factory=dict)
    """x0-predictions by level, those that are wanted for show."""


class Scoring:
    """Every one of `verifiers` scores every candidate, or those of `levels` that they cover;
    `weights` makes one score of theirs."""

    def __init__(
        self,
        verifiers: Sequence[AnyVerifier],
        weights: Mapping[str, float],
        process: Levels,
        grid: SamplingGrid,
        levels: Mapping[str, Sequence[float]],
    ) -> None:
        self.verifiers, self.weights = verifiers, weights
        self._preview_steps: dict[str, int] = {}
        of_runs: list[TrajectoryVerifier] = []
        for verifier in verifiers:
            if isinstance(verifier, TrajectoryVerifier):
                verifier.prepare(process)
                of_runs.append(verifier)
            elif verifier.preview_log_snr is not None:
                wanted = verifier.preview_log_snr
                distances = [abs(grid.log_snr(step) - wanted) for step in range(grid.num_steps)]
                self._preview_steps[verifier.name] = distances.index(min(distances))
        self.measured = list({verifier.measurement: verifier for verifier in of_runs}.values())
        """One verifier of each measurement."""
        covered: dict[str, set[int]] = {}
        for verifier in verifiers:
            if verifier.name in levels:
                covered[verifier.name] = covered_levels(levels[verifier.name], grid.num_steps)
            elif declared := getattr(verifier, "log_snr_range", None):
                # Of level k: the state at step k - 1, whose x0-prediction a look there has.
                read = [*map(grid.log_snr, range(grid.num_steps)), math.inf]
                low, high = declared
                covered[verifier.name] = {
                    level
                    for level in range(1, len(read))
                    if low <= read[level - (level < grid.num_steps)] <= high
                }
        self._covered, self._last = covered, grid.num_steps
        if covered and of_runs:
            raise UserError(
                f"verifiers.{of_runs[0].name} compares a run with its noise at every look, and "
                f"verifiers.{next(iter(covered))} scores some levels alone; use one of them"
            )
        if not self.at(grid.num_steps):
            raise UserError(
                f"verifiers {', '.join(covered)} score some levels alone, and none the final "
                "image; add one without levels, or let a level end at 1"
            )
        for level in range(1, grid.num_steps + 1) if covered else ():
            if not any(weights[verifier.name] for verifier in self.at(level)):
                raise UserError(
                    f"verifiers {', '.join(covered)}: what scores step {level} of {grid.num_steps} "
                    "has weight=0, and would rank nothing there; let others cover it"
                )

    def at(self, level: int) -> list[AnyVerifier]:
        """Returns the verifiers that score a run to `level`."""
        every = [verifier.name for verifier in self.verifiers]
        names = scored_by(every, self._covered, level, self._last)
        return [verifier for verifier in self.verifiers if verifier.name in names]

    def looks_at_images(self, level: int) -> bool:
        """Whether a run to `level` must be decoded for its scores."""
        return any(
            not isinstance(verifier, TrajectoryVerifier) and not takes_latents(verifier)
            for verifier in self.at(level)
        )

    def watch(self, trace: Trace, stop: int) -> Callable[[SampleState], None]:
        """Returns the callback for each step of a run to `stop`, which keeps the wanted states."""
        levels = {verifier.level(stop) for verifier in self.measured}
        steps = set(self._preview_steps.values())

        def keep(reached: SampleState) -> None:
            if reached.step in levels:
                trace.levels[reached.step] = reached.x
            if reached.step - 1 in steps and reached.x0 is not None:
                trace.readings[reached.step - 1] = reached.x0

        return keep

    def scores(
        self,
        level: int,
        images: Images,
        latents: Latents,
        prompts: Sequence[str],
        previews: Mapping[int, Images],
        noise: Latents,
        measured: Mapping[Hashable, Any],
    ) -> list[dict[str, float]]:
        """Returns each verifier's score of each run to `level`; `previews` are by step."""
        columns = {}
        for verifier in self.at(level):
            if isinstance(verifier, TrajectoryVerifier):
                values = verifier.score_measured(noise, measured[verifier.measurement])
                columns[verifier.name] = values.double().tolist()
            else:
                seen = previews.get(self._preview_steps.get(verifier.name, -1))
                given = latents if takes_latents(verifier) else images
                columns[verifier.name] = checked_scores(verifier, given, prompts, seen).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def total(self, scores: Mapping[str, float]) -> float:
        """Returns the weighted sum as choices see it; NaN for one that is not finite, which never
        wins. A verifier of weight 0 has no part in it."""
        weights = self.weights.items()
        total = sum(w * scores[name] for name, w in weights if w and name in scores)
        return round(total, SCORE_DECIMALS) if math.isfinite(total) else math.nan


def shown_levels(every: int, first: int, stop: int, last: int) -> list[int]:
    """Returns the levels of a run from `first` to `stop` whose x0-predictions are shown: every so
    many steps, but not at the `last`, which has an image."""
    return [
        level for level in range(first + 1, min(stop + 1, last)) if every and level % every == 0
    ]


def covered_levels(shares: Sequence[float], num_steps: int) -> set[int]:
    """Returns the levels from one share of the sampling steps to another, both included."""
    low, high = (share * num_steps for share in shares)
    return {level for level in range(num_steps + 1) if low - 1e-9 <= level <= high + 1e-9}


def scored_by(
    names: Sequence[str], covered: Mapping[str, Collection[int]], level: int, last: int
) -> list[str]:
    """Returns the verifiers that score a look at `level`: those that cover it, else those without
    levels, else those of the `last`, the final image."""
    own = [name for name in names if level in covered.get(name, ())]
    others = [name for name in names if name not in covered]
    return own or others or [name for name in names if last in covered[name]]
