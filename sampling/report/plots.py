"""The plots of a black-point study, and what all plots share, as SVG text.

Nothing refers to the outside, every axis is labelled with its quantity and unit, and a checkpoint
keeps its color from plot to plot.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from blackpoint.sampling.report.rows import DATA, Row
from blackpoint.sampling.statistics import estimates as statistics

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


def color_of(checkpoint: str, checkpoints: Sequence[str]) -> str:
    """Returns the color of a checkpoint, by its place among all of them."""
    if checkpoint == DATA:
        return DATA_COLOR
    return COLORS[list(checkpoints).index(checkpoint) % len(COLORS)]


@matplotlib.rc_context(STYLE)
def luminance_histograms(groups: Mapping[str, Sequence[Row]], checkpoints: Sequence[str]) -> str:
    """Draws how border luminance is distributed, one panel for each set of rows."""
    edges = np.linspace(0, 1, 21)
    figure, axes = panels(len(groups), 1, width=2.6, height=2.5)
    for axis, (label, rows) in zip(axes, groups.items(), strict=True):
        values = np.clip([row.border_luminance for row in rows], 0, 1)
        shares = np.histogram(values, edges)[0] / max(1, len(values))
        color = color_of(rows[0].checkpoint, checkpoints) if rows else DATA_COLOR
        axis.bar(
            edges[:-1],
            shares,
            width=0.05,
            align="edge",
            color=color,
            edgecolor="white",
            linewidth=0.4,
        )
        axis.set_title(f"{label.replace('_', '-')} (n = {len(rows)})", loc="left")
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.5, 1], ["0\nblack", "0.5", "1\nwhite"])
        axis.set_xlabel("border luminance")
    axes[0].set_ylabel("share of images")
    _share_y(axes)
    return svg_text(figure, "histograms")


@matplotlib.rc_context(STYLE)
def border_by_guidance(rows: Sequence[Row], checkpoints: Sequence[str]) -> str:
    """Draws mean border luminance against guidance scale for black and white captions."""
    figure, (axis,) = panels(1, 1, width=7.2, height=3.2)
    for place, name in enumerate(checkpoints):
        for group, marker, line in (("white", "o", "-"), ("black", "s", "--")):
            own = [row for row in rows if row.checkpoint == name and row.group == group]
            scales = sorted({row.guidance_scale for row in own})
            if not scales:
                continue
            found = [
                statistics.mean(
                    [row.border_luminance for row in own if row.guidance_scale == scale]
                )
                for scale in scales
            ]
            below = [max(0.0, each.value - each.low) for each in found]
            above = [max(0.0, each.high - each.value) for each in found]
            axis.errorbar(
                [
                    scale + 0.05 * place for scale in scales
                ],  # so that intervals don't hide each other
                [each.value for each in found],
                yerr=[below, above],
                marker=marker,
                linestyle=line,
                color=color_of(name, checkpoints),
                capsize=3,
                label=f"{name.replace('_', '-')}, on a {group} background",
            )
    for ideal in (0, 1):
        axis.axhline(ideal, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set_ylim(-0.05, 1.05)
    axis.set_xlabel("guidance scale (1 is off)")
    axis.set_ylabel("mean border luminance")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return svg_text(figure, "guidance")


def panels(num_columns: int, num_rows: int, width: float, height: float) -> tuple[Figure, list]:
    """Makes a figure of panels, each `width` by `height` inches, and returns it with its axes."""
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, list(axes.flat)


def _share_y(axes: Sequence) -> None:
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)


def svg_text(figure: Figure, name: str) -> str:
    """Writes a figure as an <svg> element; `name` keeps the ids of several on one page apart."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(
            text, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight"
        )
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
