"""Mixtures: several data sets, read in proportion to their weights.

Position p of the mixture is a position of one data set, which walks its own endless passes. Which
one follows a schedule that repeats every M positions, M the sum of the weights as whole numbers:
Tijdeman's (1980, "The chairman assignment problem"). After any p positions, data set i of K with
share w_i has had n_i of them with

    | n_i - w_i p | <= 1 - 1 / (2K - 2),

so that every batch, and every run however short, has the proportions that were asked for. There is
no epoch of the whole: the epoch of a sample is the pass of its own data set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from omegaconf import MISSING

from blackpoint.data.files.paths import PathText

MAX_CYCLE = 1 << 16
"""Largest M; weights whose whole numbers sum to more are rounded to multiples of 1 / MAX_CYCLE."""


@dataclass
class MixtureEntry:
    """One data set of a mixture."""

    shards: PathText = MISSING
    """Its shards, a folder or a pattern, as data.shards."""
    weight: float = 1.0
    """Its share of the samples is this over the sum of all weights; 0 leaves it out."""


class Schedule:
    """Which data set each position belongs to, in O(1)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.parts = whole_weights(weights)
        self._cycle = _cycle(self.parts)
        before = np.zeros(len(self._cycle), np.uint32)
        for number in range(len(self.parts)):
            is_here = self._cycle == number
            before[is_here] = np.arange(is_here.sum())
        self._before = before

    def at(self, position: int) -> tuple[int, int]:
        """Returns the data set of a position, and the position's number among its own."""
        cycle, offset = divmod(position, len(self._cycle))
        number = int(self._cycle[offset])
        return number, cycle * self.parts[number] + int(self._before[offset])


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Returns whole numbers in the proportion of `weights`, which are positive, sum <= MAX_CYCLE.

    A weight means its decimal digits: 0.1 and 0.2 are 1 and 2.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*parts)
    parts = [part // divisor for part in parts]
    total = sum(parts)
    if total <= MAX_CYCLE:
        return parts
    # Largest remainders, but at least one each.
    rounded = [max(1, part * MAX_CYCLE // total) for part in parts]
    left = MAX_CYCLE - sum(rounded)
    remainders = [part * MAX_CYCLE % total for part in parts]
    for number in sorted(range(len(parts)), key=lambda n: -remainders[n])[: max(left, 0)]:
        rounded[number] += 1
    return rounded


def _cycle(parts: Sequence[int]) -> np.ndarray:
    """Returns the data set of each of the M positions of a cycle, uint16.

    In units of 1 / (M (2K - 2)): the lead of data set i before position p is 2K - 2 times
    a_i p - M n_i; of those whose next sample may come already, the most urgent is taken.
    """
    total, bound = sum(parts), max(2 * len(parts) - 2, 1)
    share = np.array(parts, np.int64)
    owed = np.zeros(len(parts), np.int64)  # a_i p - M n_i
    cycle = np.empty(total, np.uint16)
    for position in range(total):
        owed += share
        urgency = (total * (bound - 1) - bound * owed) / share
        urgency[bound * owed < total] = np.inf
        chosen = int(np.argmin(urgency)) if len(parts) > 1 else 0
        owed[chosen] -= total
        cycle[position] = chosen
    return cycle
