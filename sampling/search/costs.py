"""Costs of runs in advance, and the ledger of the actual costs, counted where they arise.

The unit is a row of the network (NFE). A forward-and-backward row counts 3, as in Ma et al. 2025.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple

from blackpoint.sampling.grid import SamplingGrid
from blackpoint.sampling.samplers import SAMPLERS

if TYPE_CHECKING:
    from blackpoint.sampling.guidance import Guidance
    from blackpoint.sampling.verifiers.verifier import TrajectoryVerifier

BACKWARD_NFE = 2


class Rows(NamedTuple):
    """Rows of the prompts, and of guidance's empty prompt."""

    conditional: int
    unconditional: int


@dataclass(frozen=True)
class Costs:
    """Costs of runs of one sample with a sampler, and those of trajectory scores on top."""

    sampler: str
    grid: SamplingGrid
    guidance: Guidance
    measured: Sequence[TrajectoryVerifier] = ()
    """One verifier of each measurement."""

    def run_rows(self, first: int, stop: int) -> Rows:
        """Returns the rows of a run from level `first` to `stop`."""
        steps = range(first, stop)
        ahead = [step + 1 for step in steps if step + 1 < self.grid.num_steps]
        evaluated = [*steps, *ahead * (SAMPLERS[self.sampler].evaluations_per_step - 1)]
        guided = sum(self.guidance.is_on(self.grid.timesteps[step]) for step in evaluated)
        return Rows(len(evaluated), guided)

    def score_rows(self, stop: int) -> Rows:
        """Returns the rows of the scores of a run to level `stop`."""
        counts = [
            (verifier.evaluations(stop), verifier.guidance_scale != 1) for verifier in self.measured
        ]
        return Rows(sum(rows for rows, _ in counts), sum(rows for rows, guided in counts if guided))

    def nfe(self, first: int, stop: int) -> int:
        """Returns the NFE of a run and its scores."""
        return sum(self.run_rows(first, stop)) + sum(self.score_rows(stop))


@dataclass
class Ledger:
    """Counts of one search; add two with +."""

    conditional_rows: int = 0
    """UNet rows of the prompts."""
    unconditional_rows: int = 0
    """UNet rows of guidance's empty prompt."""
    backward_rows: int = 0
    """UNet rows that a gradient went back through."""
    decoded_images: int = 0
    """Images that the autoencoder decoded, previews included."""
    verifier_calls: int = 0
    """Images that verifiers scored, each verifier by itself."""
    denoising_s: float = 0.0
    """Seconds in the sampler."""
    decoding_s: float = 0.0
    """Seconds in the autoencoder."""
    verifying_s: float = 0.0
    """Seconds in the verifiers."""

    @property
    def nfe(self) -> int:
        """UNet evaluations; one that is differentiated counts 3."""
        rows = self.conditional_rows + self.unconditional_rows
        return rows + BACKWARD_NFE * self.backward_rows

    def count(self, samples: int, rows: Rows, backward: bool = False) -> None:
        """Adds `samples` times the rows of one, and those that a gradient goes back through."""
        self.conditional_rows += samples * rows.conditional
        self.unconditional_rows += samples * rows.unconditional
        if backward:
            self.backward_rows += samples * sum(rows)

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Ledger) -> Ledger:
        return Ledger(*map(operator.sub, astuple(self), astuple(other)))

    def share(self, count: int) -> Ledger:
        """Returns the share of one of `count` equal candidates of a batch."""
        parts = {}
        for name, value in vars(self).items():
            parts[name] = round(value / count, 4) if name.endswith("_s") else value // count
        return Ledger(**parts)

    def to_row(self) -> dict[str, float]:
        """Returns every count and the NFE."""
        return {"nfe": self.nfe, **asdict(self)}
