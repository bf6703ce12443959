"""What all plots share: colors, style, panels, and SVG text that refers to nothing outside."""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

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
