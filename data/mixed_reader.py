"""Training samples of a mixture by position; data/mixture.py says which data set is where.

Positions are dealt out in runs of `run_length`: 1, or the batch size where every batch must be of
one bucket, and so of one data set.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.latents import LatentReader
from blackpoint.data.mixture import Schedule
from blackpoint.data.order.order import Place
from blackpoint.data.reader import Reader, collate


class MixedReader:
    """The readers of several data sets, each with its name and its own range of indices."""

    def __init__(
        self, readers: Sequence[Reader], weights: Sequence[float], run_length: int = 1
    ) -> None:
        self.readers = readers
        self.schedule = Schedule(weights)
        self.run_length = run_length

    def __len__(self) -> int:
        return sum(len(reader) for reader in self.readers)

    def place(self, position: int) -> Place:
        """Returns which sample training reads at `position`; its epoch is that of its data set."""
        return self._find(position)[1]

    def batch(self, positions: Iterable[int]) -> dict[str, Any]:
        """Returns the training batch of some positions."""
        return collate([self._find(position) for position in positions], training=True)

    def _find(self, position: int) -> tuple[Reader, Place]:
        run, row = divmod(position, self.run_length)
        number, run_of_part = self.schedule.at(run)
        place = self.readers[number].place(run_of_part * self.run_length + row)
        return self.readers[number], Place(place.epoch, place.index, position)


ENCODED_ALIKE = (
    "vae",
    "text_encoder",
    "resolution",
    "buckets",
    "crop",
    "moments_shape",
    "prompt_embeds_shape",
    "pooled_shape",
    "scaling_factor",
)


def check_alike(readers: Mapping[str, Reader]) -> None:
    """Raises UserError where data sets, by "field=value", can't stand in one batch."""
    (first_name, first), *others = readers.items()
    for name, reader in others:
        if not isinstance(reader, LatentReader) and not isinstance(first, LatentReader):
            continue
        if not isinstance(reader, LatentReader) or not isinstance(first, LatentReader):
            raise UserError(
                f"{first_name} and {name}: one holds latents and the other images; mix data sets "
                "of one kind: encode both with `blackpoint data encode`, or neither"
            )
        for field in ENCODED_ALIKE:
            ours, theirs = getattr(first.encoding, field), getattr(reader.encoding, field)
            if ours != theirs:
                raise UserError(
                    f"{first_name} and {name}: were encoded differently, {field}={ours} and "
                    f"{theirs}; encode both by one checkpoint at one resolution"
                )
