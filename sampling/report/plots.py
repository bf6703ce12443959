"""Shared parts of plots: colors, style, panels, intervals, luminance, SVG text without links."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blackpoint.sampling.statistics.estimates import Estimate

COLORS = ("#b3541e", "#1f6f8b", "#5b8c3a", "#7a5195", "#8a8a8a")
DATA_COLOR = "#333333"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
}


def draw_luminance(axis: Axes, values: Sequence[float], color: str, title: str) -> None:
    """Draws the distribution of luminances in [0, 1] as a histogram."""
    edges = np.linspace(0, 1, 21)
    shares = np.histogram(np.clip(values, 0, 1), edges)[0] / max(1, len(values))
    axis.bar(edges[:-1], shares, 0.05, align="edge", color=color, edgecolor="white", linewidth=0.4)
    axis.set_title(f"{plain(title)} (n = {len(values)})", loc="left", fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.5, 1], ["0\nblack", "0.5", "1\nwhite"])


def draw_estimates(
    axis: Axes, xs: Sequence[float], estimates: Sequence[Estimate], **style: Any
) -> None:
    """Draws values over xs, with their intervals."""
    axis.errorbar(xs, [estimate.value for estimate in estimates], yerr=_bars(estimates), **style)


def draw_named(
    axis: Axes, names: Sequence[str], estimates: Sequence[Estimate | None], marker: str
) -> None:
    """Draws a line for each name, its value with the interval; the first has another color."""
    for index, estimate in enumerate(estimates):
        if estimate is not None:
            color = COLORS[min(index, 1)]
            style = {"fmt": marker, "color": color, "capsize": 2, "markersize": 5}
            axis.errorbar(estimate.value, index, xerr=_bars([estimate]), **style)  # type: ignore[arg-type]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", color="#eeeeee")


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Returns how far intervals reach below and above; 0 where there is no interval."""
    below = [max(0.0, estimate.value - estimate.low) for estimate in estimates]
    return [below, [max(0.0, estimate.high - estimate.value) for estimate in estimates]]


def share_y(axes: Sequence[Axes]) -> None:
    """Gives all panels the highest top."""
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)


def plain(text: str) -> str:
    """Writes a name so that matplotlib takes no formula for it, and hides none."""
    return text.replace("$", r"\$").lstrip("_")


def panels(num_columns: int, num_rows: int, width: float, height: float) -> tuple[Figure, list]:
    """Makes a figure of panels, each `width` by `height` inches, and returns it with its axes."""
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, list(axes.flat)


def svg_text(figure: Figure, name: str) -> str:
    """Writes a figure as an <svg> element; `name` keeps the ids of several on one page apart."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(
            text, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight"
        )
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
