"""The order of training with buckets: every batch of one bucket, every sample once a pass.

The n_b samples of bucket b are read as an endless stream of permutations, its passes. Epoch e of
the whole has

    floor((e + 1) n_b / B) - floor(e n_b / B)

batches of B samples of bucket b: what does not fill a batch is carried over, so that a bucket of
fewer than B samples comes every few epochs, and its batch reaches over several of its passes. The
batches of an epoch come in the order of a permutation. Epoch e begins with global batch

    S(e) = sum over b of floor(e n_b / B),    e N / B - num_buckets < S(e) <= e N / B,

so the epoch of any global batch is found by bisection between two bounds: position 10^6 costs what
position 0 costs.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

from blackpoint.data.order.permutation import permute
from blackpoint.data.order.sorted_samples import SortedSamples


@dataclass(frozen=True)
class Place:
    """Which sample of the index, in which pass, and where in all passes laid end to end."""

    epoch: int
    index: int
    position: int


@dataclass
class BucketOrder:
    """Positions of training -> samples; the positions [g B, (g + 1) B) are of one bucket.

    `stream` tells data sets of a mixture apart, which must not walk in step.
    """

    samples: SortedSamples
    seed: int
    batch_size: int
    stream: str = ""
    _latest: tuple[int, int, int] = field(default=(-1, 0, 0), repr=False)

    def place(self, position: int) -> Place:
        """Returns the sample at `position`; its epoch is the pass of its bucket's stream."""
        batch, row = divmod(position, self.batch_size)
        bucket, batch_of_bucket = self.batch(batch)
        count = self.samples.counts[bucket]
        epoch, offset = divmod(batch_of_bucket * self.batch_size + row, count)
        width, height = self.samples.buckets.sizes[bucket]
        stream = f"{self.stream}/{width}x{height}"
        return Place(
            epoch,
            self.samples.index(bucket, permute(offset, count, self.seed, epoch, stream)),
            position,
        )

    def batch(self, number: int) -> tuple[int, int]:
        """Returns the bucket of global batch `number`, and which batch of that bucket it is."""
        if self._latest[0] != number:
            self._latest = (number, *self._find(number))
        return self._latest[1:]

    def replacement(self, bucket: int | None, number: int) -> int:
        """Returns one of the samples of a bucket, or of all, chosen by any number."""
        if bucket is None:
            return self.samples.index(0, number % sum(self.samples.counts))
        return self.samples.index(bucket, number % self.samples.counts[bucket])

    def epoch_of(self, number: int) -> int:
        """Returns the epoch of the whole that global batch `number` belongs to."""
        counts, size = self.samples.counts, self.batch_size
        total = sum(counts)
        low = number * size // total
        high = (number + len(counts)) * size // total + 2
        return low + bisect_right(range(low, high + 1), number, key=self.start_of) - 1

    def start_of(self, epoch: int) -> int:
        """Returns S(epoch), the number of batches before an epoch of the whole."""
        return sum(epoch * count // self.batch_size for count in self.samples.counts)

    def _find(self, number: int) -> tuple[int, int]:
        epoch = self.epoch_of(number)
        start = self.start_of(epoch)
        size = self.start_of(epoch + 1) - start
        rest = permute(number - start, size, self.seed, epoch, f"{self.stream}/batches")
        for bucket, count in enumerate(self.samples.counts):
            first = epoch * count // self.batch_size
            num_batches = (epoch + 1) * count // self.batch_size - first
            if rest < num_batches:
                return bucket, first + rest
            rest -= num_batches
        raise AssertionError("an epoch holds the batches of its buckets")
