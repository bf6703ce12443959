"""`python -m blackpoint.scripts.measurements.measure_intervals`: how often the intervals of an
evaluation hold the truth.

Draws sets whose mean, deviation or FID is known and counts the 95 % intervals that cover it. The
FID is of Gaussians: features of equal variance, or of variances 1, 1/2, ..., 1/d, against
references whose mean and covariance are exact. Writes docs/interval_coverage.md.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.page import Page, Part
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.frechet import Gaussian, frechet_estimates
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script

SHIFT, SCALE = 0.3, 1.3
"""Distance of the Gaussians' means, and ratio of their deviations."""
Draw = Callable[[np.random.Generator, int], np.ndarray]
DISTRIBUTIONS: dict[str, tuple[Draw, float, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0, 1.0),
    "lognormal, sigma 1/2": (
        lambda rng, n: rng.lognormal(0, 0.5, n),
        float(np.exp(1 / 8)),
        float(np.sqrt(np.expm1(1 / 4) * np.exp(1 / 4))),
    ),
    "lognormal, sigma 1": (
        lambda rng, n: rng.lognormal(0, 1, n),
        float(np.exp(1 / 2)),
        float(np.sqrt(np.expm1(1) * np.exp(1))),
    ),
    "0, 1/2, 1 with .1, .2, .7": (
        lambda rng, n: rng.choice([0, 0.5, 1], p=[0.1, 0.2, 0.7], size=n),
        0.8,
        float(np.sqrt(0.75 - 0.64)),
    ),
}
"""Name -> how it is drawn, its mean, its standard deviation."""


@dataclass
class IntervalsConfig:
    """What is drawn."""

    sizes: list[int] = field(default_factory=lambda: [10, 20, 50])
    """Observations in a sample."""
    num_samples: int = 1000
    """Samples of each distribution and size."""
    sets: list[list[int]] = field(
        default_factory=lambda: [
            *([8, 50], [8, 200], [32, 70], [32, 100], [32, 200], [32, 1000], [64, 140], [64, 300])
        ]
    )
    """Features d and images n of each FID."""
    num_sets: int = 200
    """Sets of each FID."""
    timed: list[int] = field(default_factory=lambda: [2048, 6000])
    """Features and images of the one that is timed; empty for none."""
    output: str = "docs/interval_coverage.md"
    """File to write."""


@dataclass(frozen=True)
class Coverage:
    """What estimates of one quantity are worth."""

    bias: float
    deviation: float
    covered: float
    """Share of intervals that hold the truth."""


def coverage(estimates: Sequence[Estimate], truth: float) -> Coverage:
    """Compares estimates with what they estimate."""
    values = np.array([estimate.value for estimate in estimates])
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    return Coverage(float(values.mean() - truth), float(values.std(ddof=1)), float(covered))


def gaussian_sets(
    num_features: int, num_images: int, count: int, is_even: bool
) -> tuple[list[Estimate], list[Estimate | None], float]:
    """Returns FID at n and at infinite n of `count` sets, and the true FID."""
    rng = np.random.default_rng([num_features, num_images, is_even])
    variances = np.ones(num_features) if is_even else 1 / np.arange(1, num_features + 1)
    rotation = np.linalg.qr(rng.normal(size=(num_features, num_features)))[0]
    mean = np.full(num_features, SHIFT / num_features**0.5)
    covariance = torch.from_numpy(rotation @ np.diag(variances) @ rotation.T)
    reference = Gaussian(torch.zeros(num_features, dtype=torch.float64), covariance)
    at_n, at_infinity = [], []
    for _ in range(count):
        rows = SCALE * rng.normal(size=(num_images, num_features)) * variances**0.5
        images = torch.from_numpy((rows + mean) @ rotation.T)
        measured, extrapolated = frechet_estimates(images, reference, np.arange(num_images))
        at_n.append(measured)
        at_infinity.append(extrapolated)
    return at_n, at_infinity, SHIFT**2 + (SCALE - 1) ** 2 * float(variances.sum())


def means_table(config: IntervalsConfig) -> Table:
    """Measures the intervals of means and standard deviations."""
    lines = []
    for name, (draw, mean, deviation) in DISTRIBUTIONS.items():
        for size in config.sizes:
            rng = np.random.default_rng(size)
            samples = [draw(rng, size) for _ in range(config.num_samples)]
            ours = coverage([statistics.mean(sample) for sample in samples], mean)
            spread = coverage([statistics.std(sample) for sample in samples], deviation)
            lines.append((name, size, ours.covered, spread.covered))
    share = {"mean": ".3f", "standard deviation": ".3f"}
    return Table.of({"distribution": "", "n": "", **share}, lines)


def fid_table(config: IntervalsConfig) -> Table:
    """Measures bias, deviation and intervals of FID at n and at infinite n."""
    lines = []
    for is_even in (True, False):
        for num_features, num_images in config.sets:
            at_n, extrapolated, truth = gaussian_sets(
                num_features, num_images, config.num_sets, is_even
            )
            biased = coverage(at_n, truth)
            of_mean = coverage(at_n, truth + biased.bias).covered
            known = [estimate for estimate in extrapolated if estimate is not None]
            far = coverage(known, truth) if known else None
            at_infinity = (
                (far.bias, far.deviation, far.covered) if far else ("left out", None, None)
            )
            name = "equal" if is_even else "1/j"
            cells = (truth, biased.bias, of_mean, biased.covered, *at_infinity)
            lines.append((name, num_features, num_images, *cells))
    columns = {"variances": "", "d": "", "n": "", "true FID": ".3f", "bias at n": "+.3f"}
    columns |= {"holds mean at n": ".3f", "holds true FID": ".3f", "bias at infinite n": "+.3f"}
    columns |= {"deviation": ".3f", "infinite n holds true FID": ".3f"}
    return Table.of(columns, lines)


def measure(config: IntervalsConfig) -> str:
    """Measures everything; returns the page."""
    machine = describe_machine()
    torch.set_num_threads(1)  # several that wait for each other take CPU time beside other work
    parts: list[Part] = [
        f"`python -m blackpoint.scripts.measurements.measure_intervals`, "
        f"{machine['date']}, {machine['machine']}. Share of "
        f"95 % intervals that hold the known value: {config.num_samples} samples per line for "
        f"means and standard deviations, {config.num_sets} sets per line for FID.",
        means_table(config),
        "FID of n images drawn from a Gaussian of d features against exact references of another; "
        f"mean distance {SHIFT}, deviations {SCALE} times the references'.",
        fid_table(config),
    ]
    if config.timed:
        num_features, num_images = config.timed
        started_s, busy_s = time.perf_counter(), time.process_time()
        gaussian_sets(num_features, num_images, 1, is_even=False)
        seconds, busy_s = time.perf_counter() - started_s, time.process_time() - busy_s
        parts.append(
            f"d = {num_features}, n = {num_images}: {busy_s:.0f} s of CPU time "
            f"({seconds:.0f} s by the clock, beside what else the machine did) for the set, its "
            "references' root, and both FIDs with their intervals, on one thread."
        )
    page = Page("How often the intervals hold the truth", parts).markdown()
    write_whole(Path(config.output), page)
    return page


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script(
        "measure_intervals", lambda: print(measure(load(IntervalsConfig, argv)), end="")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
