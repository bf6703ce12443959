"""Summary of an evaluation's rows: every metric with n and its 95 % interval.

Computed from rows alone, in the order of their keys, so that it does not matter how many processes
wrote them, nor in which order. Means are over prompts (each the mean of its images), because images
of one prompt are not independent; of a single prompt they are over its images.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blackpoint.data.files.plain import finite, json_object
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.metric import FID, Better, Evaluated, Metric, MetricConfig
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import Table

JSON_FILE, CSV_FILE, MARKDOWN_FILE = "metrics.json", "metrics.csv", "metrics.md"
WORDS: dict[Better, str] = {"lower": "lower is better", "higher": "higher is better", "": ""}


@dataclass(frozen=True)
class Summary:
    """All metrics of an evaluation, their cost, and notes."""

    metrics: tuple[Metric, ...]
    notes: tuple[str, ...]
    skipped: dict[str, str]
    num_images: int
    num_prompts: int
    nfe: float
    """UNet evaluations of all images."""
    seconds: float
    """Of sampling and measuring, over all processes."""
    where: Literal["border", "image"] = "image"
    """Whose luminance is compared where prompts leave it open."""
    peak_gb: float = 0.0


def summarise(
    metrics: Sequence[MetricConfig],
    evaluated: Evaluated,
    skipped: Mapping[str, str],
    where: Literal["border", "image"],
    notes: Sequence[str] = (),
) -> Summary:
    """Computes every metric that the rows have.

    skipped: what was asked for and not measured, with the reason; notes: told before the metrics'.
    """
    rows = evaluated.rows
    results = [metric.numbers(evaluated) for metric in metrics]
    seconds = sum(row["sampling_s"] + row["measuring_s"] for row in rows)
    return Summary(
        tuple(metric for numbers, _ in results for metric in numbers),
        (*notes, *(note for _, metric_notes in results for note in metric_notes)),
        dict(skipped),
        len(rows),
        len({row["prompt_index"] for row in rows}),
        round(sum(row["nfe"] for row in rows)),
        round(seconds, 2),
        where,
        max(row.get("peak_gb") or 0.0 for row in rows),
    )


def title_at_n(name: str, counts: Sequence[int]) -> str:
    """Returns a metric's title: of FID it says at which numbers of images it and its interval are.

    counts: n of each value that stands under the title.
    """
    if name != FID or not counts:
        return name
    low, high = min(counts), max(counts)
    if low == high:
        return f"FID at n = {low}; interval at this n"
    return f"FID at n = {low} to {high}; interval at each n"


def markdown(summary: Summary, for_terminal: bool = False) -> str:
    """Writes the table of metrics, with notes, as Markdown; or its columns under one another."""
    rows = [
        {
            "metric": title_at_n(metric.name, [metric.estimate.n])
            + (f" ({metric.group})" if metric.group else ""),
            "value [95 % interval]": metric.estimate,
            "n": f"{metric.estimate.n} {metric.unit}",
            "": WORDS[metric.better],
        }
        for metric in summary.metrics
    ]
    columns = {"metric": "", "value [95 % interval]": ".4g", "n": "", "": ""}
    cost = (
        f"{summary.num_images} images of {summary.num_prompts} prompts, {summary.nfe:.0f} NFE, "
        f"{summary.seconds:.0f} s, peak memory {summary.peak_gb:.2f} GB."
    )
    notes = [*summary.notes, *(f"skipped: {k}: {why}" for k, why in summary.skipped.items())]
    table = Table(rows, columns)
    shown = table.text() if for_terminal else table.markdown()
    parts = [shown, f"{cost}\n", *(f"- {note}" for note in notes)]
    return "\n".join(parts).rstrip() + "\n"


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes metrics.md, metrics.csv and, last, metrics.json, which says that all is done."""
    write_whole(folder / MARKDOWN_FILE, markdown(summary))
    columns = ["metric", "group", "value", "low", "high", "n", "unit", "better", "title"]
    rows = [
        {"metric": metric.name, "title": title_at_n(metric.name, [metric.estimate.n])}
        | {"group": metric.group, "unit": metric.unit, "better": metric.better}
        | {name: f"{value:.8g}" for name, value in asdict(metric.estimate).items()}
        for metric in summary.metrics
    ]
    write_whole(folder / CSV_FILE, Table(rows, dict.fromkeys(columns, "")).csv())
    write_whole(folder / JSON_FILE, json.dumps(finite(asdict(summary)), indent=1) + "\n")


def read_summary(folder: Path) -> Summary | None:
    """Reads metrics.json; None where the evaluation is not finished."""
    path = folder / JSON_FILE
    if not path.is_file():
        return None
    content = json_object(path.read_bytes(), path)
    metrics = []
    for row in content.pop("metrics"):
        numbers: dict[str, Any] = row.pop("estimate")
        numbers |= {key: math.nan for key, value in numbers.items() if value is None}
        metrics.append(Metric(**row, estimate=Estimate(**numbers)))
    return Summary(tuple(metrics), notes=tuple(content.pop("notes")), **content)
