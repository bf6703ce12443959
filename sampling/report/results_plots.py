"""The plots of results, as SVG text: metrics against NFE, and how luminance is distributed."""

import math
import re
from collections.abc import Sequence

import matplotlib

from blackpoint.sampling.report.page import Facts, Figure, Part, Section
from blackpoint.sampling.report.plots import (
    COLORS,
    DATA_COLOR,
    STYLE,
    draw_estimates,
    draw_luminance,
    panels,
    plain,
    share_y,
    svg_text,
)
from blackpoint.sampling.report.results import Cell, Results, is_seed, short, title_of
from blackpoint.sampling.report.results_tables import settings_of, shown_estimate

NFE_KEYS = ("num_steps", "budget_nfe")
MOST_PANELS, MOST_SERIES, MOST_METRICS = 24, 16, 6
MARKERS = "osD^vPX*"


def scaling_curves(results: Results, names: Sequence[str]) -> list[tuple[str, str]]:
    """Draws each metric against NFE, a line for each series; returns (metric, SVG).

    Bars are the cell's own interval, of several seeds Student's t over these. A series is an arm,
    and values of the grid, but for what sets the NFE; an arm's trailing number ("random, 96")
    counts as that. Nothing where no series has two NFE.
    """
    series: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if cell.values and math.isfinite(cell.nfe):
            series.setdefault(series_of(cell), []).append(cell)
    if not any(len({cell.nfe for cell in cells}) > 1 for cells in series.values()):
        return []
    drawn = []
    for name in names[:MOST_METRICS]:
        by_setting = {
            title: [cell for cell in cells if name in cell.values]
            for title, cells in series.items()
        }
        if any(len({cell.nfe for cell in cells}) > 1 for cells in by_setting.values()):
            title = title_of(name, [cell for cells in by_setting.values() for cell in cells])
            drawn.append((title, _scaling(by_setting, name, title)))
    return drawn


def series_of(cell: Cell) -> str:
    """Names the series that a cell is a point of."""
    arm = re.sub(r"[,_\s-]*\d+$", "", cell.arm)
    varied = [
        f"{short(key)} {value}"
        for key, value in cell.varied.items()
        if not is_seed(key) and key.rpartition(".")[2] not in NFE_KEYS
    ]
    return ", ".join(filter(None, [arm, *varied])) or "all"


def luminance_parts(results: Results, note: str = "") -> list[Part]:
    """Shows how bright the images are: how it is distributed, of a single image the number."""
    title, single = "How bright the images are", {}
    for setting, cells in settings_of(results).items():
        values = [value for cell in cells for value in cell.luminance]
        if len(values) == 1:
            single[setting] = f"luminance {values[0]:.3f} (0 black, 1 white), of one image"
    figure = Figure(title, luminance_distributions(results), note)
    return [figure, Section("" if figure.content else title, [Facts("", single)])]


@matplotlib.rc_context(STYLE)
def luminance_distributions(results: Results) -> str | None:
    """Draws how luminance is distributed, a panel for each setting of several images; None without
    one."""
    groups: dict[str, tuple[list[float], str]] = {}
    if results.reference_luminance:
        groups["real images"] = (results.reference_luminance, DATA_COLOR)
    for number, (setting, cells) in enumerate(settings_of(results).items()):
        values = [value for cell in cells for value in cell.luminance]
        if len(values) > 1:
            groups[setting] = (values, COLORS[number % len(COLORS)])
    if not any(name != "real images" for name in groups):
        return None
    shown = dict(list(groups.items())[:MOST_PANELS])
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = panels(columns, rows, width=2.7, height=2.1)
    for axis, (title, (values, color)) in zip(axes, shown.items(), strict=False):
        draw_luminance(axis, values, color, title)
    share_y(axes[: len(shown)])
    for number, axis in enumerate(axes):
        if number % columns == 0:
            axis.set_ylabel("share of images")
        axis.set_visible(number < len(shown))
    return svg_text(figure, "luminance")


@matplotlib.rc_context(STYLE)
def _scaling(series: dict[str, list[Cell]], name: str, title: str) -> str:
    figure, (axis,) = panels(1, 1, width=8.6, height=4.0)
    for number, (label, cells) in enumerate(list(series.items())[:MOST_SERIES]):
        points: dict[float, list[Cell]] = {}
        for cell in cells:
            points.setdefault(cell.nfe, []).append(cell)
        shown = {x: shown_estimate(points[x], name) for x in sorted(points)}
        estimates = {x: estimate for x, estimate in shown.items() if estimate is not None}
        middle = min(len(series), MOST_SERIES) / 2
        draw_estimates(
            axis,
            [x * (1 + 0.012 * (number - middle)) for x in estimates],  # no interval hides another
            list(estimates.values()),
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number // len(COLORS) % len(MARKERS)],
            linestyle="-" if number < len(COLORS) else "--",
            linewidth=1.2,
            markersize=4,
            elinewidth=0.7,
            capsize=2,
            label=plain(label),
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.set_xlabel("UNet evaluations (NFE) of an image, or of a prompt's search")
    axis.set_ylabel(plain(title))
    cut = f"the first {MOST_SERIES} of {len(series)}" if len(series) > MOST_SERIES else None
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, title=cut)
    return svg_text(figure, f"scaling-{name}")
