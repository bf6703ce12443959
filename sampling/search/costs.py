"""Costs of runs in advance, and the ledger of the actual costs, counted where they arise.

The unit is a row of the network (NFE). A forward-and-backward row counts 3, as in Ma et al. 2025.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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


def guided_rows(t: Any, guidance: Guidance) -> tuple[int, int]:
    """Returns the rows of a sample at t where guidance doubles them."""
    return 1, int(guidance.is_on(t))


@dataclass(frozen=True)
class Costs:
    """Costs of runs of one sample with a sampler, and those of trajectory scores on top."""

    sampler: str
    grid: SamplingGrid
    guidance: Guidance
    measured: Sequence[TrajectoryVerifier] = ()
    """One verifier of each measurement."""
    rows_at: Callable[[Any, Guidance], tuple[int, int]] = guided_rows
    """(timestep, guidance) -> rows of a sample: of the prompt, and beside."""
    goes_back_in_steps: bool = False
    """Whether a gradient goes back through the network at each tilted step."""

    def run_rows(self, first: int, stop: int) -> Rows:
        """Returns the rows of a run from level `first` to `stop`."""
        steps = range(first, stop)
        ahead = [step + 1 for step in steps if step + 1 < self.grid.num_steps]
        return self._rows([*steps, *ahead * (SAMPLERS[self.sampler].evaluations_per_step - 1)])

    def _rows(self, evaluated: Sequence[int]) -> Rows:
        rows = [self.rows_at(self.grid.timesteps[step], self.guidance) for step in evaluated]
        return Rows(sum(row for row, _ in rows), sum(row for _, row in rows))

    def tilted_steps(self, first: int, stop: int) -> range:
        """Returns the steps of a run whose noise can be tilted: all but a whole run's last, which
        draws none, or next to none (`Process.grid`)."""
        return range(first, min(stop, self.grid.num_steps - 1))

    def backward_rows(self, first: int, stop: int) -> int:
        """Returns the rows of a run that gradients in its steps go back through."""
        return sum(self._rows(self.tilted_steps(first, stop))) if self.goes_back_in_steps else 0

    def score_rows(self, stop: int) -> Rows:
        """Returns the rows of the scores of a run to level `stop`."""
        from blackpoint.sampling.guidance import Guidance

        first, total = self.grid.timesteps[0], Rows(0, 0)
        for verifier in self.measured:
            rows = self.rows_at(first, Guidance(verifier.guidance_scale))
            count = verifier.evaluations(stop)
            total = Rows(*(n + count * row for n, row in zip(total, rows, strict=True)))
        return total

    def nfe(self, first: int, stop: int) -> int:
        """Returns the NFE of a run and its scores; a row that is differentiated counts 3."""
        rows = sum(self.run_rows(first, stop)) + sum(self.score_rows(stop))
        return rows + BACKWARD_NFE * self.backward_rows(first, stop)


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
    verifier_gradients: int = 0
    """Those of them whose scores were differentiated."""
    denoising_s: float = 0.0
    """Seconds in the sampler."""
    decoding_s: float = 0.0
    """Seconds in the autoencoder."""
    verifying_s: float = 0.0
    """Seconds in the verifiers, and on the way back from scores inside a run."""

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


def costs_text(ledger: Mapping[str, float], num_prompts: int) -> str:
    """Returns the costs of a prompt, on average, in words; of a row of ledger.json."""
    one = {key: ledger.get(key, 0.0) / num_prompts for key in (*vars(Ledger()), "nfe")}
    seconds = sum(value for key, value in one.items() if key.endswith("_s"))
    back = one["verifier_gradients"]
    return f"{one['nfe']:.0f} NFE, {one['decoded_images']:.0f} decodes" + (
        f" and {back:.0f} gradients of verifiers" * (back > 0) + f" in {seconds:.3g} s"
    )


def costs_line(planned: Ledger, num_prompts: int) -> str:
    """Says what a search will cost before it starts."""
    decodes, calls = planned.decoded_images, planned.verifier_calls
    one = f"{planned.nfe} NFE, {decodes} decodes and {calls} verifier calls per prompt"
    return f"{one}; {num_prompts * planned.nfe} NFE for {num_prompts} prompts"
