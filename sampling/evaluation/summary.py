"""What the rows of an evaluation say: every metric with n and its 95 % interval.

Computed from rows alone, in the order of their keys, so that it does not matter how many processes
wrote them, nor in which order. Means are over prompts (each the mean of its images), because images
of one prompt are not independent; of a single prompt they are over its images.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from blackpoint.data.files.plain import finite
from blackpoint.sampling.evaluation.config import MetricsConfig
from blackpoint.sampling.evaluation.measures import Measures
from blackpoint.sampling.evaluation.metrics.geneval import GenEvalScores
from blackpoint.sampling.evaluation.metrics.reference_set import Reference
from blackpoint.sampling.evaluation.metrics.set_metrics import (
    FID,
    FID_INFINITE,
    feature_metrics,
    independent_groups,
    logit_metrics,
)
from blackpoint.sampling.evaluation.rows import FEATURE_COLUMN, LOGIT_COLUMN, Columns, Row
from blackpoint.sampling.prompts.brightness_target import TONES
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.estimates import NUM_RESAMPLES, Estimate, expanded_interval
from blackpoint.sampling.statistics.frechet import lack_of_images
from blackpoint.sampling.statistics.table import Table
from blackpoint.sampling.whole_file import write_whole

JSON_FILE, CSV_FILE, MARKDOWN_FILE = "metrics.json", "metrics.csv", "metrics.md"
ERROR, LUMINANCE, INVARIANCE = "luminance error", "luminance", "noise-invariance"
SPREAD, SPREAD_RATIO = "luminance spread", "luminance spread over the references'"
DISTANCE = "luminance distance to the references"
OPEN = "open"
Better = Literal["lower", "higher", ""]
Unit = Literal["prompts", "images"]
WORDS: dict[Better, str] = {"lower": "lower is better", "higher": "higher is better", "": ""}


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation."""

    name: str
    group: str
    """Which prompts: a category, a tone that they ask for, or "" for all."""
    estimate: Estimate
    unit: Unit
    """What n counts."""
    better: Better = ""


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
    config: MetricsConfig,
    rows: Sequence[Row],
    measures: Measures,
    reference: Reference | None,
    dependence: Sequence[float],
    geneval: GenEvalScores | None,
) -> Summary:
    """Computes every metric that the rows have."""
    rows = sorted(rows, key=lambda row: (row["prompt_index"], row["image"]))
    found, notes = set_metrics(config, rows, reference)
    lacking = {
        name: reason
        for name, reason in measures.skipped.items()
        if not _was_measured(measures.lacking[name], rows, reference)
    }
    for name in (name for name in config.verifiers if name not in lacking):
        own = [row for row in rows if math.isfinite(row[name])]
        if len(own) < len(rows):
            notes.append(f"{name}: {len(rows) - len(own)} images without a finite score left out")
        if own:
            found.append(_mean(name, "", own, itemgetter(name), "higher", statistics.mean_score))
    found += brightness_metrics(config, rows, reference)
    usable = [value for value in dependence if math.isfinite(value)]
    if len(usable) < len(dependence):
        notes.append(f"{INVARIANCE}: not finite for {len(dependence) - len(usable)} prompts")
    if usable:
        estimate = statistics.mean(usable, seed=config.seed)
        found.append(Metric(INVARIANCE, "", estimate, "prompts", "lower"))
    if geneval is not None:
        found.append(Metric("GenEval", "", geneval.overall, "prompts", "higher"))
        found += [
            Metric("GenEval", task, each, "prompts", "higher")
            for task, each in geneval.tasks.items()
        ]
        if geneval.missing:
            notes.append(f"GenEval: no images of {', '.join(geneval.missing)}")
    seconds = sum(row["sampling_s"] + row["measuring_s"] for row in rows)
    return Summary(
        tuple(found),
        tuple(notes),
        lacking,
        len(rows),
        len({row["prompt_index"] for row in rows}),
        round(sum(row["nfe"] for row in rows)),
        round(seconds, 2),
        config.brightness.where,
        max(row.get("peak_gb") or 0.0 for row in rows),
    )


def set_metrics(
    config: MetricsConfig, rows: Sequence[Row], reference: Reference | None
) -> tuple[list[Metric], list[str]]:
    """Computes FID, KID, precision, recall and IS of rows in order, as far as they can be."""
    groups = [row["prompt_index"] for row in rows]
    found, notes = [], []
    has = {column: all(column in row for row in rows) for column in (FEATURE_COLUMN, LOGIT_COLUMN)}
    if reference is not None and reference.features is not None and has[FEATURE_COLUMN]:
        features = torch.from_numpy(np.stack([row[FEATURE_COLUMN] for row in rows]))
        found += feature_metrics(features, reference.features, groups, config.sets, config.seed)
        num_groups = len(np.unique(independent_groups(groups)))
        lack = lack_of_images(len(features), features.shape[1], num_groups)
        if lack:
            notes.append(f"{FID_INFINITE} left out: {lack}")
    if config.sets.has_classifier and has[LOGIT_COLUMN]:
        logits = torch.from_numpy(np.stack([row[LOGIT_COLUMN] for row in rows]))
        found += logit_metrics(logits, groups, config.sets, config.seed)
    metrics = [
        Metric(
            each.name, "", each.estimate, "images", "lower" if each.lower_is_better else "higher"
        )
        for each in found
    ]
    if len(rows) <= config.sets.neighbourhood and reference is not None:
        notes.append(f"precision and recall need more than {config.sets.neighbourhood} images")
    return metrics, notes


def brightness_metrics(
    config: MetricsConfig, rows: Sequence[Row], reference: Reference | None
) -> list[Metric]:
    """Computes errors and luminances by group, and how varied the open prompts' images are."""
    found = []
    asked = [row for row in rows if row["luminance_error"] is not None]
    if asked:
        found.append(_mean(ERROR, "", asked, itemgetter("luminance_error"), "lower"))
        groups = list(dict.fromkeys(group_of(row) for row in asked))
        for group in groups:
            own = [row for row in asked if group_of(row) == group]
            found.append(_mean(ERROR, group, own, itemgetter("luminance_error"), "lower"))
            found.append(_mean(LUMINANCE, group, own, _asked_luminance))
    where = "border_luminance" if config.brightness.where == "border" else "luminance"
    left = _by_prompt([row for row in rows if row["luminance_error"] is None], itemgetter(where))
    if sum(map(len, left)) < 2:
        return found
    values = np.array(left) if len(left) > 1 else np.array(left[0])  # a prompt's images in a row
    unit: Unit = "prompts" if len(left) > 1 else "images"
    found.append(Metric(SPREAD, OPEN, statistics.std(values, seed=config.seed), unit))
    if reference is not None:
        real = reference.border_luminance if where == "border_luminance" else reference.luminance
        if np.std(real) > 0:
            ratio = statistics.std_ratio(values, real, seed=config.seed)
            found.append(Metric(SPREAD_RATIO, OPEN, ratio, unit))
        distance = luminance_distance(values, real, config.seed)
        found.append(Metric(DISTANCE, OPEN, distance, unit, "lower"))
    return found


def luminance_distance(values: np.ndarray, reference: np.ndarray, seed: int) -> Estimate:
    """Estimates the Wasserstein-1 distance of two sets of luminances, with a bootstrap interval.

    values: (n,), or (n, m) of which rows are drawn; reference: (M,). Both are resampled. The
    distance of finite samples of one distribution is above 0, and so is the interval, which is of
    the distance at this n.
    """
    rng = np.random.default_rng(seed)

    def distances(drawn: np.ndarray) -> np.ndarray:
        others = rng.choice(reference, (len(drawn), len(reference)))
        return np.array(list(map(stats.wasserstein_distance, drawn, others)))

    resampled = statistics.bootstrap(values, distances, rng, NUM_RESAMPLES // 4)
    value = float(stats.wasserstein_distance(values.ravel(), reference))
    return Estimate(value, *expanded_interval(resampled, len(values)), len(values))


def group_of(row: Row) -> str:
    """Returns a row's category or, without one, the tone that its prompt asks for."""
    if row["category"]:
        return str(row["category"])
    if row["asked_low"] is None:
        return OPEN
    tones = [
        name for name, value in TONES.items() if value == row["asked_low"] == row["asked_high"]
    ]
    return tones[0] if tones else "asked"


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


def markdown(summary: Summary) -> str:
    """Writes the table of metrics, with notes, as Markdown."""
    rows = [
        {
            "metric": title_at_n(each.name, [each.estimate.n])
            + (f" ({each.group})" if each.group else ""),
            "value [95 % interval]": each.estimate,
            "n": f"{each.estimate.n} {each.unit}",
            "": WORDS[each.better],
        }
        for each in summary.metrics
    ]
    columns = {"metric": "", "value [95 % interval]": ".4g", "n": "", "": ""}
    cost = (
        f"{summary.num_images} images of {summary.num_prompts} prompts, {summary.nfe:.0f} NFE, "
        f"{summary.seconds:.0f} s, peak memory {summary.peak_gb:.2f} GB."
    )
    notes = [*summary.notes, *(f"skipped: {k}: {why}" for k, why in summary.skipped.items())]
    parts = [Table(rows, columns).markdown(), f"{cost}\n", *(f"- {note}" for note in notes)]
    return "\n".join(parts).rstrip() + "\n"


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes metrics.md, metrics.csv and, last, metrics.json, which says that all is done."""
    write_whole(folder / MARKDOWN_FILE, markdown(summary))
    columns = ["metric", "group", "value", "low", "high", "n", "unit", "better", "title"]
    rows = [
        {"metric": each.name, "title": title_at_n(each.name, [each.estimate.n])}
        | {"group": each.group, "unit": each.unit, "better": each.better}
        | {name: f"{value:.8g}" for name, value in asdict(each.estimate).items()}
        for each in summary.metrics
    ]
    write_whole(folder / CSV_FILE, Table(rows, dict.fromkeys(columns, "")).csv())
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


def _mean(
    name: str,
    group: str,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    better: Better = "",
    estimate: Callable[[Sequence[float]], Estimate] = statistics.mean,
) -> Metric:
    by_prompt = _by_prompt(rows, value)
    if len(by_prompt) > 1:
        means = [float(np.mean(each)) for each in by_prompt]
        return Metric(name, group, estimate(means), "prompts", better)
    return Metric(name, group, estimate(by_prompt[0]), "images", better)


def _by_prompt(rows: Sequence[Row], value: Callable[[Row], float]) -> list[list[float]]:
    """Returns the values of each prompt's images."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["prompt_index"], []).append(value(row))
    return list(found.values())


def _was_measured(columns: Columns, rows: Sequence[Row], reference: Reference | None) -> bool:
    """Whether an earlier start measured what this one cannot."""
    if FEATURE_COLUMN in columns and (reference is None or reference.features is None):
        return False
    return all(column in row for row in rows for column in columns)


def _asked_luminance(row: Row) -> float:
    return row["border_luminance" if row["asked_where"] == "border" else "luminance"]


def _numbers(estimate: Mapping[str, float | None]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in estimate.items()}
