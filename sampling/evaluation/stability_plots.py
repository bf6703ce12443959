"""The plots of a stability study, as SVG text."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from blackpoint.sampling.evaluation.stability_arms import Place, Prices
from blackpoint.sampling.evaluation.stability_findings import (
    Choice,
    Correlation,
    best_of,
    counts,
    methods,
    rivals,
)
from blackpoint.sampling.evaluation.stability_rows import Found, Scores
from blackpoint.sampling.report.plots import COLORS, STYLE, panels, svg_text
from blackpoint.sampling.statistics.estimates import Estimate, mean

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<")


@matplotlib.rc_context(STYLE)
def correlation_plot(tables: Mapping[Place, Sequence[Correlation]]) -> str:
    """Draws the mean rank correlation of every stability score with every quality score."""
    names = list(dict.fromkeys(each.first for table in tables.values() for each in table))
    judges = list(dict.fromkeys(each.second for table in tables.values() for each in table))
    height = 0.9 + 0.26 * len(names) * max(1, len(judges)) ** 0.5
    figure, axes = panels(len(tables), 1, width=3.4, height=max(2.4, height))
    for axis, (place, table) in zip(axes, tables.items(), strict=True):
        for each in table:
            own = judges.index(each.second)
            row = len(names) - 1 - names.index(each.first)
            shift = 0.5 * (own / max(1, len(judges) - 1) - 0.5) if len(judges) > 1 else 0.0
            _bar(axis, each.spearman, row - shift, COLORS[own % len(COLORS)], MARKERS[own % 8])
        axis.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in reversed(names)])
        axis.set_title(title_of(place), loc="left")
        axis.set_xlabel("mean Spearman within a prompt")
    for place_, judge in enumerate(judges):
        color, marker = COLORS[place_ % len(COLORS)], MARKERS[place_ % 8]
        axes[-1].plot([], [], marker, color=color, label=judge.replace("_", " "))
    if judges:
        axes[-1].legend(title="with", loc="center left", bbox_to_anchor=(1.02, 0.5))
    widest = max(abs(limit) for axis in axes for limit in axis.get_xlim())
    for axis in axes:
        axis.set_xlim(-widest, widest)
    return svg_text(figure, "correlations")


@matplotlib.rc_context(STYLE)
def ablation_plot(tables: Mapping[Place, Sequence[Choice]], quality: str) -> str:
    """Draws the expected quality of the best of k noises by each score."""
    figure, axes = panels(len(tables), 1, width=3.4, height=3.0)
    for axis, (place, table) in zip(axes, tables.items(), strict=True):
        for number, score in enumerate(dict.fromkeys(each.score for each in table)):
            own = [each for each in table if each.score == score]
            axis.plot(
                [each.num_noises for each in own],
                [each.quality[quality].value for each in own],
                marker=MARKERS[number % len(MARKERS)],
                markersize=3.5,
                linewidth=1,
                color=matplotlib.colormaps["tab10"](number % 10),
                label=score.replace("_", " "),
            )
        axis.set_xscale("log")
        axis.set_title(title_of(place), loc="left")
        axis.set_xlabel("noises chosen from, k")
    axes[0].set_ylabel(f"expected {quality.replace('_', ' ')}")
    axes[-1].legend(title="best of k by", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return svg_text(figure, f"ablation-{quality}")


@matplotlib.rc_context(STYLE)
def cost_plot(places: Sequence[Found], quality: str) -> str:
    """Draws mean quality against NFE a prompt, of selection, its rivals and optimisation."""
    figure, axes = panels(len(places), 1, width=3.6, height=3.2)
    for axis, found in zip(axes, places, strict=True):
        prices = Prices(found.config, found.place.num_steps)
        ladder = counts(found.best_of.seeds.shape[1])
        searched = [mean(_finite(best_of(found, k * prices.image()), quality)) for k in ladder]
        _line(axis, [k * prices.image() for k in ladder], searched, "black", "best-of-N")
        for number, (name, (nfe, values)) in enumerate(methods(found).items()):
            color = COLORS[number % len(COLORS)]
            estimate = mean(_finite(values, quality))
            _point(axis, nfe, estimate, color, MARKERS[number % 8], name)
        plain = [
            (name, nfe, values)
            for name, (nfe, values) in rivals(found, prices.selection()).items()
            if name.startswith("random noise")
        ]
        for (name, nfe, values), color in zip(plain, itertools.cycle(("#888888", "#bbaa00"))):
            _point(axis, nfe, mean(_finite(values, quality)), color, "X", name)
        axis.set_xscale("log")
        axis.set_title(title_of(found.place), loc="left")
        axis.set_xlabel("NFE a prompt")
    axes[0].set_ylabel(f"mean {quality.replace('_', ' ')}")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return svg_text(figure, f"cost-{quality}")


def title_of(place: Place) -> str:
    """Returns what a panel or section of a place is called."""
    return f"{place.checkpoint.replace('_', '-')}, {place.num_steps} steps"


def _finite(values: Scores, quality: str) -> np.ndarray:
    return values[quality][np.isfinite(values[quality])]


def _bar(axis: Axes, estimate: Estimate, height: float, color: str, marker: str) -> None:
    axis.plot([estimate.low, estimate.high], [height, height], color=color, linewidth=1.4)
    axis.plot([estimate.value], [height], marker, color=color, markersize=4)


def _line(axis: Axes, nfe: list[int], values: list[Estimate], color: str, label: str) -> None:
    axis.plot(nfe, [each.value for each in values], color=color, linewidth=1.2, label=label)
    axis.fill_between(
        nfe,
        [each.low for each in values],
        [each.high for each in values],
        color=color,
        alpha=0.12,
        linewidth=0,
    )


def _point(axis: Axes, nfe: int, estimate: Estimate, color: str, marker: str, label: str) -> None:
    axis.errorbar(
        [nfe],
        [estimate.value],
        yerr=[[estimate.value - estimate.low], [estimate.high - estimate.value]],
        color=color,
        marker=marker,
        markersize=5,
        capsize=3,
        linestyle="none",
        label=label,
    )
