"""How bright a prompt asks its image to be, how far images are from that, and how varied they are.

A prompt names its luminance ("on a black background", "a solid white image"), or its file gives the
range that a photograph of it has, `"luminance": [low, high]` from 0 black to 1 white, null where it
is open: configs/prompts/brightness.jsonl has solid tones, nights, snow, and prompts that leave it
open. The ranges of scenes are ours, wide on purpose: a model whose images cannot leave a middle
gray misses them, and taste does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges, is_number
from blackpoint.sampling.evaluation.metric import (
    Evaluated,
    Metric,
    MetricConfig,
    Numbers,
    Row,
    Unit,
    by_prompt,
    mean_metric,
)
from blackpoint.sampling.prompts.brightness_target import TONES, luminance_target

if TYPE_CHECKING:
    import numpy as np

    from blackpoint.sampling.prompts.prompt_set import Prompt
    from blackpoint.sampling.statistics.estimates import Estimate

FIELD = "luminance"
ERROR, LUMINANCE, INVARIANCE = "luminance error", "luminance", "noise-invariance"
SPREAD, SPREAD_RATIO = "luminance spread", "luminance spread over the references'"
DISTANCE = "luminance distance to the references"
OPEN = "open"


@dataclass
class BrightnessConfig(MetricConfig):
    """How black is black, how white is white, how varied open prompts."""

    where: Literal["border", "image"] = "image"
    """Whose luminance is compared with the references' where a prompt leaves it open; the border
    is the outer two pixels."""
    invariance_prompts: int = 16
    """Number of first prompts whose first prediction is compared over several noises; 0: none."""
    invariance_noises: int = 16
    """Noises per prompt."""

    def __post_init__(self) -> None:
        check_ranges(self, "brightness.", invariance_prompts=">= 0", invariance_noises=">= 2")

    def check(self, prompts: "Sequence[Prompt]", num_images: int) -> None:
        for prompt in prompts:
            luminance_range(prompt)

    def numbers(self, evaluated: Evaluated) -> Numbers:
        metrics = asked_metrics(evaluated.rows) + self._open_metrics(evaluated)
        values = [value for value in evaluated.dependence if math.isfinite(value)]
        num_others = len(evaluated.dependence) - len(values)
        notes = [f"{INVARIANCE}: not finite for {num_others} prompts"] if num_others else []
        if values:
            from blackpoint.sampling.statistics.estimates import mean

            estimate = mean(values, seed=evaluated.seed)
            metrics.append(Metric(INVARIANCE, "", estimate, "prompts", "lower"))
        return metrics, notes

    def _open_metrics(self, evaluated: Evaluated) -> list[Metric]:
        """Says how varied the images of the prompts are that leave their luminance open."""
        import numpy as np

        from blackpoint.sampling.statistics import estimates as statistics

        column = "border_luminance" if self.where == "border" else "luminance"
        is_open = (row for row in evaluated.rows if row["luminance_error"] is None)
        by_group = by_prompt(list(is_open), itemgetter(column))
        if sum(map(len, by_group)) < 2:
            return []
        unit: Unit = "prompts" if len(by_group) > 1 else "images"
        values = np.array(by_group if unit == "prompts" else by_group[0])
        seed, reference = evaluated.seed, evaluated.reference
        metrics = [Metric(SPREAD, OPEN, statistics.std(values, seed=seed), unit)]
        if reference is not None:
            real = getattr(reference, column)
            if np.std(real) > 0:
                ratio = statistics.std_ratio(values, real, seed=seed)
                metrics.append(Metric(SPREAD_RATIO, OPEN, ratio, unit))
            distance = luminance_distance(values, real, seed)
            metrics.append(Metric(DISTANCE, OPEN, distance, unit, "lower"))
        return metrics


@dataclass(frozen=True)
class LuminanceRange:
    """The luminance that is asked for, and where in the image."""

    low: float
    high: float
    where: Literal["border", "image"] = "image"


def luminance_range(prompt: "Prompt") -> LuminanceRange | None:
    """Returns the target of the prompt's file, else of its text; None where both leave it open."""
    if FIELD in prompt.metadata:
        bounds = prompt.metadata[FIELD]
        if bounds is None:
            return None
        if not _is_range(bounds):
            raise UserError(
                f"prompt {prompt.index} ({prompt.text!r:.60}): {FIELD}={bounds!r} must be "
                "[low, high] with 0 <= low <= high <= 1, or null"
            )
        return LuminanceRange(float(bounds[0]), float(bounds[1]))
    target = luminance_target(prompt.text)
    return None if target is None else LuminanceRange(target.value, target.value, target.where)


def asked_metrics(rows: Sequence[Row]) -> list[Metric]:
    """Computes errors, and luminances by group, of the images whose prompts ask for one."""
    targeted = [row for row in rows if row["luminance_error"] is not None]
    if not targeted:
        return []
    error = itemgetter("luminance_error")
    metrics = [mean_metric(ERROR, targeted, error, "lower")]
    for group in dict.fromkeys(map(group_of, targeted)):
        members = [row for row in targeted if group_of(row) == group]
        metrics.append(mean_metric(ERROR, members, error, "lower", group))
        metrics.append(mean_metric(LUMINANCE, members, _asked_luminance, group=group))
    return metrics


def luminance_distance(values: "np.ndarray", reference: "np.ndarray", seed: int) -> "Estimate":
    """Estimates the Wasserstein-1 distance of two sets of luminances, with a bootstrap interval.

    values: (n,), or (n, m) of which rows are drawn; reference: (M,). Both are resampled. The
    distance of finite samples of one distribution is above 0, and so is the interval, which is of
    the distance at this n.
    """
    import numpy as np
    from scipy.stats import wasserstein_distance

    from blackpoint.sampling.statistics import estimates as statistics

    rng = np.random.default_rng(seed)

    def distances(drawn: np.ndarray) -> np.ndarray:
        others = rng.choice(reference, (len(drawn), len(reference)))
        return np.array(list(map(wasserstein_distance, drawn, others)))

    resampled = statistics.bootstrap(values, distances, rng, statistics.NUM_RESAMPLES // 4)
    value = float(wasserstein_distance(values.ravel(), reference))
    interval = statistics.expanded_interval(resampled, len(values))
    return statistics.Estimate(value, *interval, len(values))


def group_of(row: Row) -> str:
    """Returns a row's category or, without one, the tone that its prompt asks for."""
    if row["category"]:
        return str(row["category"])
    bounds = row["asked_low"], row["asked_high"]
    return next((name for name, tone in TONES.items() if bounds == (tone, tone)), "asked")


def _asked_luminance(row: Row) -> float:
    return row["border_luminance" if row["asked_where"] == "border" else "luminance"]


def _is_range(bounds: Any) -> bool:
    is_pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(map(is_number, bounds))
    return is_pair and 0 <= bounds[0] <= bounds[1] <= 1
