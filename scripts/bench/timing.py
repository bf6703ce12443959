"""How the benchmark times: the contestants in turn, round after round, and ratios within a round.

A machine whose speed drifts slows all contestants of a round alike, so what is compared is the
ratio r_i = a_i / b_i of a round. Its interval is a bootstrap of the geometric mean over rounds
(Efron 1979), exp(mean(log r_i)).
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Seconds = dict[str, list[float]]  # contestant -> seconds, one per round


@dataclass(frozen=True)
class Row:
    """A line of the table: values over rounds, and what is wanted of their median if anything."""

    group: str
    what: str
    unit: str
    median: float
    lowest: float
    highest: float
    n: int
    interval: tuple[float, float] | None = None  # of a ratio's geometric mean, 95 %
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        """The bound in words, or nothing."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the bound; None where none is set."""
        if self.at_least is not None:
            return self.median >= self.at_least
        return None if self.at_most is None else self.median <= self.at_most


def time_round(parts: Mapping[str, Callable[[], object]], number: int, seconds: Seconds) -> None:
    """Times every part once, starting with another one each round, and appends to `seconds`."""
    names = list(parts)
    first = number % len(names)
    for name in names[first:] + names[:first]:
        started_s = time.perf_counter()
        parts[name]()
        seconds.setdefault(name, []).append(time.perf_counter() - started_s)


def row(
    group: str,
    what: str,
    unit: str,
    values: Sequence[float],
    interval: tuple[float, float] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Summarises one value per round."""
    middle, lowest, highest = statistics.median(values), min(values), max(values)
    n = len(values)
    return Row(group, what, unit, middle, lowest, highest, n, interval, at_least, at_most)


def ratio_row(
    group: str,
    what: str,
    above: Sequence[float],
    below: Sequence[float],
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Summarises above / below, round by round, with an interval."""
    from blackpoint.sampling.statistics.estimates import mean  # scipy, which bench.gpu does without

    ratios = [a / b for a, b in zip(above, below, strict=True)]
    logs = mean([math.log(ratio) for ratio in ratios])
    interval = (math.exp(logs.low), math.exp(logs.high))
    return row(group, what, "", ratios, interval, at_least, at_most)
