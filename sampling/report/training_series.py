"""The series of a run's metrics.csv, made ready for drawing.

A series is a list of (optimizer step, value). Long ones are thinned to the extremes of equal
stretches, so that a page stays light and no spike is lost.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from blackpoint.sampling.prompts.brightness_target import luminance_target, prompt_slugs

NUM_STRETCHES = 400
Rows = Sequence[tuple[int, float]]
Series = Mapping[str, Rows]


def preview_luminance(metrics: Series, prompts: Sequence[str]) -> dict[str, Rows]:
    """Returns prompt -> luminance of its previews, of their border where the prompt fixes that."""
    prefix = "preview/luminance_"
    slugs = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    names = dict(zip(prompt_slugs(prompts), prompts, strict=True))
    by_prompt = {}
    for slug in slugs:
        if slug == "error":
            continue
        prompt = names.get(slug, slug.replace("_", " "))
        target = luminance_target(prompt)
        at_border = target is not None and target.where == "border"
        name = f"preview/border_luminance_{slug}" if at_border else prefix + slug
        if metrics.get(name):
            by_prompt[prompt] = metrics[name]
    return by_prompt


def own_validation(metrics: Series) -> str | None:
    """Names the validation loss of the network's own output where that is not v; else None."""
    names = ("validation/epsilon_loss", "validation/sample_loss")
    return next((name for name in names if metrics.get(name)), None)


def extremes(series: Rows) -> list[tuple[int, float]]:
    """Returns the series, or if it is long the lowest and highest value of each stretch of it."""
    if len(series) <= 2 * NUM_STRETCHES:
        return list(series)
    kept: list[tuple[int, float]] = []
    for stretch in range(NUM_STRETCHES):
        start, stop = (len(series) * (stretch + end) // NUM_STRETCHES for end in (0, 1))
        rows = series[start:stop]
        pair = {min(rows, key=lambda row: row[1]), max(rows, key=lambda row: row[1])}
        kept += sorted(pair)
    return kept


def smoothed(values: Iterable[float]) -> list[float]:
    """Averages each value with those before it, exponentially over about 3 % of the series.

    Values that are not finite are passed over.
    """
    listed = list(values)
    keep = 1 - 1 / max(5, len(listed) // 30)
    averages, total, weight = [], 0.0, 0.0
    for value in listed:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight if weight else math.nan)
    return averages


def bin_label(name: str) -> str:
    """Writes `validation/loss_log_snr_2_4` as `log SNR 2 to 4`; other names as they are."""
    match = re.search(r"log_snr_(-?\w+)_(-?\w+)$", name)
    if match:
        return f"log SNR {match[1]} to {match[2]}"
    return name.split("/")[-1].removeprefix("loss_").replace("_", " ")


def bin_order(name: str) -> float:
    """Orders ranges of log SNR by noise, the least first and the last timestep last."""
    match = re.search(r"log_snr_(-?\w+)_-?\w+$", name)
    if match:
        return -float(match[1]) if match[1] != "-inf" else 1e6
    return math.inf
