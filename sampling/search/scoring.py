"""The verifiers of a search: the states of a run that they read, and their scores."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from blackpoint.sampling.choices import SCORE_DECIMALS
from blackpoint.sampling.grid import SampleState, SamplingGrid
from blackpoint.sampling.process import Process
from blackpoint.sampling.verifiers.verifier import (
    Images,
    Latents,
    TrajectoryVerifier,
    Verifier,
    checked_scores,
)

AnyVerifier = Verifier | TrajectoryVerifier


@dataclass
class Trace:
    """States kept of a batch's runs on their way."""

    readings: dict[int, Tensor] = field(default_factory=dict)
    """x0-predictions by step."""
    levels: dict[int, Tensor] = field(default_factory=dict)
    """Latents by level."""


class Scoring:
    """Every one of `verifiers` scores every candidate; `weights` makes one score of theirs."""

    def __init__(
        self,
        verifiers: Sequence[AnyVerifier],
        weights: Mapping[str, float],
        process: Process,
        grid: SamplingGrid,
    ) -> None:
        self.verifiers, self.weights = verifiers, weights
        log_snr = process.schedule.log_snr[list(grid.timesteps)]
        self._preview_steps: dict[str, int] = {}
        of_runs: list[TrajectoryVerifier] = []
        for verifier in verifiers:
            if isinstance(verifier, TrajectoryVerifier):
                verifier.prepare(process)
                of_runs.append(verifier)
            elif verifier.preview_log_snr is not None:
                distance = (log_snr - verifier.preview_log_snr).abs()
                self._preview_steps[verifier.name] = int(distance.argmin())
        self.measured = list({verifier.measurement: verifier for verifier in of_runs}.values())
        """One verifier of each measurement."""
        self.looks_at_images = len(of_runs) < len(verifiers)

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
        images: Images,
        prompts: Sequence[str],
        previews: Mapping[int, Images],
        noise: Latents,
        measured: Mapping[Hashable, Any],
    ) -> list[dict[str, float]]:
        """Returns each verifier's score of each candidate; `previews` are by step."""
        columns = {}
        for verifier in self.verifiers:
            if isinstance(verifier, TrajectoryVerifier):
                values = verifier.score_measured(noise, measured[verifier.measurement])
                columns[verifier.name] = values.double().tolist()
            else:
                seen = previews.get(self._preview_steps.get(verifier.name, -1))
                columns[verifier.name] = checked_scores(verifier, images, prompts, seen).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def total(self, scores: Mapping[str, float]) -> float:
        """Returns the weighted sum as choices see it; NaN for one that is not finite, which never
        wins."""
        total = sum(weight * scores[name] for name, weight in self.weights.items())
        return round(total, SCORE_DECIMALS) if math.isfinite(total) else math.nan
