"""A metric of an evaluation: a section of the config with its measurement.

A metric may measure columns of each image (`sources`), which stay in the rows, and makes numbers
of the rows of all images (`numbers`). The fields of `MetricsConfig` are the table of metrics: each
section that is a `MetricConfig` is one. Free of torch, so that the help of a verb is instant.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from blackpoint.sampling.evaluation.metrics.reference_set import Reference
    from blackpoint.sampling.prompts.prompt_set import Prompt
    from blackpoint.sampling.statistics.estimates import Estimate

FID, INCEPTION = "FID", "inception"
FEATURE_COLUMN, LOGIT_COLUMN = "features", "logits"
"""Columns of rows of numbers, (d,) float32."""
Better = Literal["lower", "higher", ""]
Unit = Literal["prompts", "images"]
Row = dict[str, Any]
Pixels = Any
"""(N, 3, H, W) uint8, a tensor."""
Measure = Callable[[Pixels, "Sequence[Prompt]"], Sequence[Row]]
"""From images and their prompts to a row of columns for each."""


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation."""

    name: str
    group: str
    """Which prompts: a category, a tone that they ask for, or "" for all."""
    estimate: "Estimate"
    unit: Unit
    """Unit of n."""
    better: Better = ""


Numbers = tuple[list[Metric], list[str]]
"""Metrics, and notes about them."""


@dataclass(frozen=True)
class Source:
    """Source of columns of each image: a network, or a function."""

    key: str
    """Of the config, by which it is named where it cannot be loaded."""
    columns: dict[str, str]
    """Column -> digest of the settings that it is measured with; of others it is stale."""
    load: "Callable[[torch.device], Measure]"
    """Raises UserError where it lacks something, such as weights: the rest runs. What it returns
    may have `check_prompt(text)`, which raises UserError for a prompt that it cannot judge."""


@dataclass(frozen=True)
class Evaluated:
    """Inputs of an evaluation's numbers."""

    rows: Sequence[Row]
    """One per image, ordered by prompt and image."""
    reference: "Reference | None" = None
    dependence: Sequence[float] = ()
    """Deviations over noises of the first prompts' first prediction."""
    seed: int = 0
    """Of bootstraps and random splits."""

    def has(self, column: str) -> bool:
        """Whether all images were measured."""
        return all(column in row for row in self.rows)


class MetricConfig:
    """A section of the config that measures something; it defines the methods it needs."""

    def check(self, prompts: "Sequence[Prompt]", num_images: int) -> None:
        """Raises UserError for settings that can be refused before sampling."""

    def sources(self) -> list[Source]:
        """Returns the sources of its columns."""
        return []

    def numbers(self, evaluated: Evaluated) -> Numbers:
        """Returns the numbers of the rows: the mean of each column that `sources` names."""
        names = [name for source in self.sources() for name in source.columns]
        rows = evaluated.rows
        return [mean_metric(n, rows, itemgetter(n)) for n in filter(evaluated.has, names)], []


def mean_metric(
    name: str,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    better: Better = "",
    group: str = "",
    estimate: "Callable[[Sequence[float]], Estimate] | None" = None,
) -> Metric:
    """Estimates a mean over prompts, each the mean of its images; of one prompt over its images."""
    from blackpoint.sampling.statistics.estimates import mean

    estimate = estimate or mean
    values = by_prompt(rows, value)
    if len(values) == 1:
        return Metric(name, group, estimate(values[0]), "images", better)
    means = [sum(images) / len(images) for images in values]
    return Metric(name, group, estimate(means), "prompts", better)


def by_prompt(rows: Sequence[Row], value: Callable[[Row], float]) -> list[list[float]]:
    """Returns the values of each prompt's images."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row["prompt_index"], []).append(value(row))
    return list(values.values())
