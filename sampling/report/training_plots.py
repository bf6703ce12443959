"""The plots of a training run, from the series of its metrics.csv, as SVG text.

What was logged is drawn faintly, its running mean on top. Each function returns None where the
run holds nothing to draw.
"""

from collections.abc import Mapping, Sequence
from textwrap import shorten

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from blackpoint.sampling.prompts.brightness_target import luminance_target
from blackpoint.sampling.report.plots import COLORS, STYLE, panels, plain, svg_text
from blackpoint.sampling.report.training_series import (
    NUM_STRETCHES,
    Rows,
    Series,
    bin_label,
    bin_order,
    extremes,
    own_validation,
    preview_luminance,
    smoothed,
)

SHORT = 30  # values, up to which a series is drawn as its points
PANEL_WIDTH, PANEL_HEIGHT = 5.4, 3.0
BLACK_POINT_HEIGHT = 3.6
PROMPT_LENGTH = 60


@matplotlib.rc_context(STYLE)
def loss_curves(metrics: Series) -> str | None:
    """Draws training and validation loss, of the network's own output; None without a loss."""
    if not any(metrics.get(name) for name in ("train/loss", "validation/loss")):
        return None
    figure, (axis,) = panels(1, 1, width=2 * PANEL_WIDTH, height=3.4)
    for name, label, color in (
        ("train/loss", "training", COLORS[1]),
        ("train/objective", "objective, with its weights", COLORS[4]),
        (own_validation(metrics) or "validation/loss", "validation", COLORS[0]),
    ):
        draw(axis, metrics.get(name, []), color, label, smooth=name.startswith("train/"))
    finish(axis, "", "mean squared error")
    return svg_text(figure, "loss")


@matplotlib.rc_context(STYLE)
def compared_losses(runs: Mapping[str, Series]) -> str | None:
    """Draws the losses of several runs, by their names; None without a loss."""
    figure, (axis,) = panels(1, 1, width=2 * PANEL_WIDTH, height=3.4)
    for color, (name, metrics) in zip(COLORS, runs.items(), strict=False):
        draw(axis, metrics.get("train/loss", []), color, plain(name), faint=False)
        if series := metrics.get(own_validation(metrics) or "validation/loss"):
            axis.plot(*zip(*extremes(series), strict=True), color=color, linestyle="--", marker=".")
    if not axis.get_lines():
        return None
    finish(axis, "", "mean squared error")
    return svg_text(figure, "losses")


@matplotlib.rc_context(STYLE)
def loss_by_snr(metrics: Series) -> str | None:
    """Draws validation and training loss for each range of log SNR; None without ranges."""
    kinds = {
        kind: sorted(
            (name for name in metrics if name.startswith(f"{kind}/loss_") and metrics[name]),
            key=bin_order,
        )
        for kind in ("validation", "train")
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    if not kinds:
        return None
    bins = {name.split("/")[1] for names in kinds.values() for name in names}
    labels = sorted(bins, key=bin_order)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(labels)))
    colors = dict(zip(labels, shades, strict=True))
    figure, axes = panels(len(kinds), 1, width=PANEL_WIDTH, height=PANEL_HEIGHT + 0.4)
    for axis, (kind, names) in zip(axes, kinds.items(), strict=True):
        for name in names:
            color, smooth = colors[name.split("/")[1]], kind == "train"
            draw(axis, metrics[name], color, bin_label(name), faint=False, smooth=smooth)
        title = "validation" if kind == "validation" else "training, smoothed"
        finish(axis, title, "mean squared error", legend=False)
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    shown = [lines[bin_label(label)] for label in labels]
    figure.legend(handles=shown, loc="outside right center", fontsize=8)
    if any(axis.get_yscale() == "log" for axis in axes):
        for axis in axes:
            axis.set_yscale("log")
    return svg_text(figure, "snr")


@matplotlib.rc_context(STYLE)
def black_point(metrics: Series, prompts: Sequence[str] = ()) -> str | None:
    """Draws the luminance of previews against what their prompts ask for; None without previews.

    `prompts` as the run's config has them; without them they are read from the metrics' names.
    """
    curves = preview_luminance(metrics, prompts)
    fixed = {prompt: curve for prompt, curve in curves.items() if luminance_target(prompt)}
    left_open = {prompt: curve for prompt, curve in curves.items() if prompt not in fixed}
    parts = [(name, part) for name, part in (("fixed", fixed), ("open", left_open)) if part]
    error = metrics.get("preview/luminance_error")
    if not parts:
        return None
    figure, axes = panels(
        len(parts) + bool(error), 1, width=PANEL_WIDTH * 0.8, height=BLACK_POINT_HEIGHT
    )
    for axis, (name, part) in zip(axes, parts, strict=False):
        for index, (prompt, curve) in enumerate(part.items()):
            color = COLORS[index] if len(part) <= len(COLORS) else f"C{index}"
            target = luminance_target(prompt)
            if target:
                axis.axhline(target.value, color=color, linestyle="--", linewidth=1)
            label = shorten(prompt, PROMPT_LENGTH).replace("$", r"\$")  # not mathematics
            label += f" ({target.where})" if target else ""
            draw(axis, curve, color, label, smooth=False)
        axis.set_ylim(-0.03, 1.03)
        title = (
            "requested (dashed) and generated" if name == "fixed" else "prompts that leave it open"
        )
        finish(axis, title, "luminance (0 black, 1 white)", below=True, log=False)
    if error:
        draw(axes[-1], error, COLORS[3], smooth=False)
        axes[-1].set_ylim(bottom=0)
        finish(axes[-1], "distance to the requested luminance", "mean absolute error", log=False)
    return svg_text(figure, "black_point")


@matplotlib.rc_context(STYLE)
def optimizer_curves(metrics: Series) -> str | None:
    """Draws gradient norm and learning rate; None without either."""
    return _pair(
        metrics,
        ("train/gradient_norm", "gradient norm, before clipping", "norm"),
        ("train/learning_rate", "learning rate", "learning rate"),
        "optimizer",
    )


@matplotlib.rc_context(STYLE)
def weight_curves(metrics: Series) -> str | None:
    """Draws the norm of each block's weights over its first value, and the average's distance."""
    norms = {
        name.removeprefix("weights/norm").strip("_").replace("_", " ") or "all weights": series
        for name, series in metrics.items()
        if name.startswith("weights/norm") and series and series[0][1]
    }
    distance = metrics.get("weights/ema_distance")
    if not norms and not distance:
        return None
    figure, axes = panels(bool(norms) + bool(distance), 1, PANEL_WIDTH, PANEL_HEIGHT + 0.4)
    if norms:
        shades = matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(norms)))
        for (label, series), shade in zip(norms.items(), shades, strict=True):
            relative = [(step, value / series[0][1]) for step, value in series]
            whole = label == "all weights"
            draw(axes[0], relative, "#222222" if whole else shade, label, smooth=False)
        first = next(iter(norms.values()))[0][0]
        title = f"norm of the weights, step {first} = 1"
        finish(axes[0], title, "norm / first norm", below=True, log=False)
    if distance:
        draw(axes[-1], distance, COLORS[1], smooth=False)
        title = "||average - weights|| / ||weights||"
        finish(axes[-1], title, "distance of the average")
    return svg_text(figure, "weights")


@matplotlib.rc_context(STYLE)
def speed_curves(metrics: Series) -> str | None:
    """Draws images/s and the share of time waiting for data; None without either."""
    return _pair(
        metrics,
        ("train/images_per_s", "throughput", "images/s"),
        ("train/data_wait_share", "time waiting for data", "share of the time"),
        "speed",
    )


@matplotlib.rc_context(STYLE)
def memory_curves(metrics: Series) -> str | None:
    """Draws the peak memory of the process and of the GPU; None without rows."""
    series = {name: rows for name, rows in metrics.items() if name.startswith("memory/") and rows}
    if not series:
        return None
    figure, (axis,) = panels(1, 1, width=PANEL_WIDTH, height=PANEL_HEIGHT)
    for (name, rows), color in zip(series.items(), COLORS, strict=False):
        label = name.removeprefix("memory/").removesuffix("_gb").replace("_", " ")
        draw(axis, rows, color, label.replace("gpu", "GPU"), smooth=False)
    axis.set_ylim(bottom=0)
    finish(axis, "peak memory so far", "GB", log=False)
    return svg_text(figure, "memory")


def _pair(
    metrics: Series, left: tuple[str, str, str], right: tuple[str, str, str], name: str
) -> str | None:
    shown = [part for part in (left, right) if metrics.get(part[0])]
    if not shown:
        return None
    figure, axes = panels(len(shown), 1, width=PANEL_WIDTH, height=PANEL_HEIGHT)
    for axis, (metric, title, unit) in zip(axes, shown, strict=True):
        raw = metric in ("train/learning_rate",)
        draw(axis, metrics[metric], COLORS[1], smooth=not raw)
        linear = metric != "train/gradient_norm"
        if linear:
            axis.set_ylim(bottom=0)
        if metric.endswith("_share"):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        finish(axis, title, unit, log=not linear)
    return svg_text(figure, name)


def draw(
    axis: Axes,
    series: Rows,
    color: object,
    label: str = "",
    *,
    faint: bool = True,
    smooth: bool = True,
) -> None:
    """Draws one series: its points if it is short, else its running mean over the logged points."""
    if not series:
        return
    if len(series) <= SHORT or not smooth:
        steps, values = zip(*extremes(series), strict=True)
        marker = "." if len(series) <= SHORT else ""
        axis.plot(steps, values, color=color, marker=marker, label=label)
        return
    if faint:
        steps, values = zip(*extremes(series), strict=True)
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    every = max(1, len(series) // NUM_STRETCHES)
    means = list(zip((step for step, _ in series), smoothed([v for _, v in series]), strict=True))
    steps, values = zip(*(means[::-1][::every][::-1]), strict=True)  # the last one always
    axis.plot(steps, values, color=color, label=label)


def finish(
    axis: Axes, title: str, unit: str, *, log: bool = True, legend: bool = True, below: bool = False
) -> None:
    """Labels a panel, and takes a logarithmic axis where values span more than a factor of 10."""
    axis.set_title(title, loc="left")
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel(unit)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.get_lines()])
    drawn = drawn[np.isfinite(drawn)]
    if log and len(drawn) and drawn.min() > 0 and drawn.max() > 10 * drawn.min():
        axis.set_yscale("log")
    if not legend or not axis.get_legend_handles_labels()[1]:
        return
    if below:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2))
    else:
        axis.legend(fontsize=8)
