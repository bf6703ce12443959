"""The tables and sentences of a stability study, as text that HTML and Markdown share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blackpoint.sampling.evaluation.stability_arms import Place, Prices
from blackpoint.sampling.evaluation.stability_findings import (
    SELECTION,
    Cheaper,
    Choice,
    Correlation,
    Versus,
)
from blackpoint.sampling.evaluation.stability_rows import Found
from blackpoint.sampling.evaluation.stability_sets import SetMetric
from blackpoint.sampling.evaluation.summary import title_at_n
from blackpoint.sampling.statistics.estimates import LEVEL, Estimate
from blackpoint.sampling.statistics.hacking_alarm import fewest_prompts

COMPARED_WITH_PLAIN = ("random noise", "best-of-N")


@dataclass(frozen=True)
class Table:
    """Header and rows of text."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Writes it as a Markdown table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Cost:
    """What one method costs for one prompt."""

    method: str
    nfe: int
    seconds: float | None
    peak_mb: float | None
    """Most memory of a process that does it for one prompt, one noise at a time, loading included;
    of the GPU's allocator where there is one."""


def correlation_table(found: Sequence[Correlation]) -> Table:
    """Shows the rank correlations."""
    rows = [
        [
            name_of(each.first),
            name_of(each.second),
            interval(each.spearman, 3),
            interval(each.kendall, 3),
            f"{each.detectable:.3f}",
            str(each.spearman.n),
        ]
        for each in found
    ]
    header = ["stability", "quality", "Spearman", "Kendall", "would have shown", "prompts"]
    return Table(header, rows)


def versus_table(found: Sequence[Versus]) -> Table:
    """Shows each method beside each rival."""
    rows = [
        [
            each.method.replace("_", " "),
            f"{each.nfe}",
            f"{each.rival} ({each.rival_nfe} NFE)",
            name_of(each.quality),
            interval(each.difference, 3),
            f"{each.outcomes.wins} / {each.outcomes.ties} / {each.outcomes.losses}",
            f"{each.adjusted_p_value:.2g}",
            f"{each.detectable:.2g}",
        ]
        for each in found
    ]
    header = ["method", "NFE", "rival", "quality", "difference", "wins / ties / losses"]
    return Table([*header, "p (Holm)", "would have shown"], rows)


def ablation_table(found: Sequence[Choice], quality: str) -> Table:
    """Shows what the best of k noises gains by one quality score."""
    counts = list(dict.fromkeys(each.num_noises for each in found))
    names = list(dict.fromkeys(each.score for each in found))
    by_key = {(each.score, each.num_noises): each for each in found}
    rows = [
        [name_of(name), *(interval(by_key[name, k].gain[quality], 2) for k in counts)]
        for name in names
    ]
    return Table(["best of k by", *(f"k = {k}" for k in counts)], rows)


def cheaper_table(found: Sequence[Cheaper], quality: Sequence[str], judge: str) -> Table:
    """Shows every score beside the one that selects."""
    rates = [
        1000 * each.correlation.value / each.nfe if each.correlation.low > 0 else 0.0
        for each in found
    ]
    rows = []
    for each, rate in zip(found, rates, strict=True):
        rows.append(
            [
                name_of(each.score),
                f"{each.nfe}",
                interval(each.agreement, 3),
                interval(each.correlation, 3),
                f"{rate:.1f}" + (" (most)" if rate == max(rates) else "") if rate else "none",
                f"{each.selection_nfe}",
                *(interval(each.loss[name], 2) for name in quality),
            ]
        )
    header = ["score", "NFE a score", "Spearman with the first score", f"Spearman with {judge}"]
    header += ["per 1000 NFE", "NFE of selection"]
    return Table([*header, *(f"{name} minus the first's" for name in quality)], rows)


def set_table(found: Sequence[SetMetric]) -> Table:
    """Shows FID, KID and IS of the sets."""
    rows = [
        [
            title_at_n(each.metric, [each.num_images]),
            each.chosen,
            f"{each.num_images}",
            f"{each.value:.4g}",
        ]
        + ([interval(each.difference, 3)] if each.chosen != "random" else [""])
        for each in found
    ]
    return Table(["metric", "noises", "images", "value", "minus random noises"], rows)


def cost_table(found: Sequence[Cost]) -> Table:
    """Shows what the methods cost."""
    rows = [
        [
            each.method.replace("_", " "),
            f"{each.nfe}",
            "" if each.seconds is None else f"{each.seconds:.3g}",
            "" if each.peak_mb is None else f"{each.peak_mb:.0f}",
        ]
        for each in found
    ]
    return Table(["method", "NFE a prompt", "seconds a prompt", "peak memory, MB"], rows)


def costs(found: Found, peaks: dict[str, float]) -> list[Cost]:
    """Returns NFE, seconds and memory of every method; `peaks` are in MB."""
    prices, count = Prices(found.config, found.place.num_steps), len(found.pool.prompts)
    per_image = found.best_of.seconds / found.best_of.num_pairs
    share = prices.selection() / prices.pool()
    lines = [
        Cost("one image", prices.image(), per_image, peaks.get("image")),
        Cost(
            f"selection of K = {found.config.num_noises}",
            prices.selection(),
            share * found.pool.seconds / count,
            peaks.get(SELECTION),
        ),
    ]
    for ascent in found.ascents:
        nfe, peak = prices.optimisation(ascent.kind), peaks.get(f"optimise_{ascent.kind}")
        name = f"optimisation, {ascent.kind}"
        lines.append(Cost(name, nfe, ascent.seconds / count, peak))
    return lines


def conclusion(
    place: Place,
    correlations: Sequence[Correlation],
    versus: Sequence[Versus],
    found: Found,
) -> list[str]:
    """Says in words what the intervals say, and what the study could have missed."""
    lines, first = [], found.stability[0]
    if len(found.pool.prompts) < fewest_prompts():
        lines.append(
            f"Too few prompts to tell anything ({len(found.pool.prompts)}): {fewest_prompts()} "
            "are the fewest that all agree by chance in less than 5 % of studies."
        )
        correlations = []
    for each in correlations:
        if each.first != first or each.spearman.n < fewest_prompts():
            continue
        verb = "does not rank"
        if each.spearman.low > 0:
            verb = "ranks"
        elif each.spearman.high < 0:
            verb = "ranks, the other way round,"
        missed = ""
        if verb == "does not rank":
            missed = f"; a mean of {each.detectable:.3f} would have shown with power 0.8"
        lines.append(
            f"Stability ({name_of(first)}) {verb} the noises of a prompt as {name_of(each.second)} "
            f"does: mean Spearman {interval(each.spearman, 3)} over {each.spearman.n} prompts of "
            f"{found.config.num_noises} noises{missed}."
        )
    for method in dict.fromkeys(each.method for each in versus):
        lines.append(_method_line(method, [each for each in versus if each.method == method]))
    for ascent in found.ascents:
        rise = float(np.nanmean(ascent.best) - np.nanmean(ascent.first))
        early = int((ascent.steps < found.config.num_optimisation_steps).sum())
        note = f"; {early} ended early, where they diverged" if early else ""
        lines.append(
            f"Optimisation, {ascent.kind.replace('_', ' ')}: what it ascends goes from a mean of "
            f"{np.nanmean(ascent.first):.3f} to {np.nanmean(ascent.best):.3f} ({rise:+.3f}){note}."
        )
    return lines


def _method_line(method: str, versus: Sequence[Versus]) -> str:
    """Says which rivals the method is above and below: by the interval of the difference and by
    Holm's p of wins and losses, both."""
    sides: dict[str, dict[str, list[str]]] = {"beats": {}, "falls behind": {}}
    for each in versus:
        told = each.difference.low > 0 or each.difference.high < 0
        if told and each.adjusted_p_value < 1 - LEVEL:
            side = sides["beats" if each.difference.low > 0 else "falls behind"]
            side.setdefault(each.rival, []).append(name_of(each.quality))
    parts = [
        f"{verb} " + "; ".join(f"{rival} ({', '.join(by)})" for rival, by in side.items())
        for verb, side in sides.items()
        if side
    ]
    num_told = sum(len(by) for side in sides.values() for by in side.values())
    parts.append(f"is not told apart in {len(versus) - num_told} of {len(versus)} comparisons")
    return f"{name_of(method).capitalize()} " + "; it ".join(parts) + "."


def name_of(name: str) -> str:
    """Returns a column as it is shown."""
    return name.replace("_", " ")


def interval(estimate: Estimate, decimals: int) -> str:
    """Writes a value with its interval."""
    values = (estimate.value, estimate.low, estimate.high)
    value, low, high = (f"{each:+.{decimals}f}" for each in values)
    return f"{value} [{low}, {high}]"
