"""Measurements of each image of an evaluation: its luminance, and the columns of its metrics.

Everything is measured on the 8-bit image that a PNG file holds. A source that cannot be loaded is
left out and named; the rest runs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.metric import (
    FEATURE_COLUMN,
    Evaluated,
    Measure,
    MetricConfig,
    Pixels,
    Row,
    Source,
)
from blackpoint.sampling.evaluation.metrics.brightness import luminance_range
from blackpoint.sampling.pixels.luminance import border_luminance, image_luminance
from blackpoint.sampling.prompts.prompt_set import Prompt

DECIMALS = 6
MAX_CHECKED = 10_000
"""Prompts that a verifier is asked about beforehand."""


@dataclass
class Measures:
    """The loaded metrics; a column's digest is of its settings."""

    loaded: list[tuple[Source, Measure]] = field(default_factory=list)
    lacking: list[tuple[Source, str]] = field(default_factory=list)
    """Requested metrics that cannot be measured here, with the reason."""

    @property
    def columns(self) -> dict[str, str]:
        """Columns that can be measured here, with their digests."""
        return {k: v for source, _ in self.loaded for k, v in source.columns.items()}

    @property
    def asked(self) -> dict[str, str]:
        """All columns that are asked for, with their digests."""
        others = {k: v for source, _ in self.lacking for k, v in source.columns.items()}
        return self.columns | others

    def missing(self, row: Row) -> set[str]:
        """Returns the columns that a row lacks."""
        return self.columns.keys() - row.keys()

    def of_column(self, column: str) -> Measure | None:
        """Returns the function that measures a column, or None."""
        return next((measure for source, measure in self.loaded if column in source.columns), None)

    def skipped(self, evaluated: Evaluated) -> dict[str, str]:
        """Returns the metrics that no start has measured, by key, with the reason."""
        real = None if evaluated.reference is None else evaluated.reference.features
        return {
            source.key: reason
            for source, reason in self.lacking
            if (FEATURE_COLUMN in source.columns and real is None)
            or not all(map(evaluated.has, source.columns))
        }

    @torch.no_grad()
    def measure(self, pixels: Pixels, prompts: Sequence[Prompt], wanted: set[str]) -> list[Row]:
        """Measures images (N, 3, H, W) uint8; returns a row of the wanted columns for each."""
        rows: list[Row] = [{} for _ in prompts]
        for source, measure in self.loaded:
            if wanted & source.columns.keys():
                for row, measured in zip(rows, measure(pixels, prompts), strict=True):
                    row |= measured
        return rows


def load_measures(
    metrics: Sequence[MetricConfig], prompts: Sequence[Prompt], device: torch.device
) -> Measures:
    """Loads all metrics; those that lack something are skipped, with the reason.

    Raises UserError for a prompt that a verifier cannot judge.
    """
    measures = Measures()
    for source in itertools.chain.from_iterable(metric.sources() for metric in metrics):
        if taken := measures.asked.keys() & source.columns.keys():
            raise UserError(f"{source.key}: {min(taken)} is measured by another metric; rename it")
        try:
            measure = source.load(device)
        except UserError as error:
            measures.lacking.append((source, str(error)))
            continue
        check = getattr(measure, "check_prompt", None)
        for prompt in prompts[:MAX_CHECKED] if check else ():
            check(prompt.text)  # type: ignore[misc]
        measures.loaded.append((source, measure))
    return measures


def luminance_rows(pixels: Pixels, prompts: Sequence[Prompt]) -> list[Row]:
    """Measures luminance of the image and of its border, and the distance to the requested one."""
    images = pixels.float() / 255
    rows: list[Row] = []
    whole, border = image_luminance(images), border_luminance(images)
    for number, prompt in enumerate(prompts):
        row: Row = {
            "luminance": round(whole[number].item(), DECIMALS),
            "border_luminance": round(border[number].item(), DECIMALS),
            **dict.fromkeys(("asked_low", "asked_high", "asked_where", "luminance_error")),
        }
        if (target := luminance_range(prompt)) is not None:
            row |= {f"asked_{name}": value for name, value in asdict(target).items()}
            measured = (border if target.where == "border" else whole)[number]
            error = torch.maximum(target.low - measured, measured - target.high).clamp(min=0)
            row["luminance_error"] = round(error.item(), DECIMALS)  # 0 inside the range
        rows.append(row)
    return rows
