"""What the rows of an evaluation say: every metric with n and its 95 % interval.

Computed from rows alone, in the order of their keys, so that it does not matter how many processes
wrote them, nor in which order. Means are over prompts (each the mean of its images), because images
of one prompt are not independent; of a single prompt they are over its images.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blackpoint.data.files.plain import finite
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.metrics.metric import Better, Evaluated, Metric, MetricConfig
from blackpoint.sampling.evaluation.metrics.sets import FID
from blackpoint.sampling.statistics.estimates import Estimate

JSON_FILE, CSV_FILE, MARKDOWN_FILE = "metrics.json", "metrics.csv", "metrics.md"
WORDS: dict[Better, str] = {"lower": "lower is better", "higher": "higher is better", "": ""}


@dataclass(frozen=True)
class Summary:
    """All metrics of an evaluation, what they cost, and what there is to say of them."""

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
    found = [metric.numbers(evaluated) for metric in metrics]
    seconds = sum(row["sampling_s"] + row["measuring_s"] for row in rows)
    return Summary(
        tuple(metric for numbers, _ in found for metric in numbers),
        (*notes, *(note for _, own in found for note in own)),
        dict(skipped),
        len(rows),
        len({row["prompt_index"] for row in rows}),
        round(sum(row["nfe"] for row in rows)),
        round(seconds, 2),
        where,
        max(row.get("peak_gb") or 0.0 for row in rows),
    )


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the table of metrics."""
    lines = [
        [
            title_at_n(each.name, [each.estimate.n]) + (f" ({each.group})" if each.group else ""),
            shown(each.estimate),
            f"{each.estimate.n} {each.unit}",
            WORDS[each.better],
        ]
        for each in summary.metrics
    ]
    return ["metric", "value [95 % interval]", "n", ""], lines


def title_at_n(name: str, counts: Sequence[int]) -> str:
    """Returns a metric's title: of FID it says at which numbers of images it and its interval are.

    counts: n of each value that stands under the title.
    """
    if name != FID or not counts:
        return name
    low, high = min(counts), max(counts)
    return (
        f"FID at n = {low}; interval at this n"
        if low == high
        else (f"FID at n = {low} to {high}; interval at each n")
    )


def shown(estimate: Estimate) -> str:
    """Writes a value with its interval, to four digits."""
    value, low, high = (f"{each:.4g}" for each in (estimate.value, estimate.low, estimate.high))
    interval = f" [{low}, {high}]" if math.isfinite(estimate.low) else " [too few for an interval]"
    return value + interval


def markdown(summary: Summary) -> str:
    """Writes the table, with notes, as Markdown."""
    header, lines = table(summary)
    text = [f"| {' | '.join(header)} |", "|---|---|---|---|"]
    text += [f"| {' | '.join(line)} |" for line in lines]
    text += [
        "",
        f"{summary.num_images} images of {summary.num_prompts} prompts, {summary.nfe:.0f} NFE, "
        f"{summary.seconds:.0f} s, peak memory {summary.peak_gb:.2f} GB.",
    ]
    text += ["", *(f"- {note}" for note in summary.notes)] if summary.notes else []
    text += [f"- skipped: {name}: {reason}" for name, reason in summary.skipped.items()]
    return "\n".join(text) + "\n"


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes metrics.md, metrics.csv and, last, metrics.json, which says that all is done."""
    write_whole(folder / MARKDOWN_FILE, markdown(summary))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "group", "value", "low", "high", "n", "unit", "better", "title"])
    for each in summary.metrics:
        numbers = (
            f"{value:.8g}" for value in (each.estimate.value, each.estimate.low, each.estimate.high)
        )
        title = title_at_n(each.name, [each.estimate.n])
        writer.writerow(
            [each.name, each.group, *numbers, each.estimate.n, each.unit, each.better, title]
        )
    write_whole(folder / CSV_FILE, text.getvalue())
    write_whole(folder / JSON_FILE, json.dumps(finite(asdict(summary)), indent=1) + "\n")


def read_summary(folder: Path) -> Summary | None:
    """Reads metrics.json; None where the evaluation is not finished."""
    path = folder / JSON_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    metrics = tuple(
        Metric(**{**each, "estimate": Estimate(**_numbers(each["estimate"]))})
        for each in content.pop("metrics")
    )
    return Summary(metrics, notes=tuple(content.pop("notes")), **content)


def _numbers(estimate: Mapping[str, float | None]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in estimate.items()}
