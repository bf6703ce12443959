"""The report page of a training run: numbers at a glance, plots, previews.

All of it comes from the series of metrics.csv and the grids in previews/.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from blackpoint.data.files.dotted import flat
from blackpoint.sampling.report import training_plots as run_plots
from blackpoint.sampling.report.page import Figure, spread
from blackpoint.sampling.report.training_series import Series, own_validation, smoothed

NUM_GRIDS = 5


def at_a_glance(metrics: Series, max_steps: int | None = None) -> dict[str, str]:
    """Returns the run's figures as text, those that it has."""
    if not any(metrics.values()):
        return {}
    last_step = max(step for series in metrics.values() for step, _ in series)
    items = {"optimizer steps": f"{last_step}" + (f" of {max_steps}" if max_steps else "")}
    values = {name: [value for _, value in series] for name, series in metrics.items() if series}
    if loss := values.get("train/loss"):
        items["training loss"] = f"{smoothed(loss)[-1]:.4g} (running mean at the end)"
    of_v = ", of v" if own_validation(metrics) else ""
    for name, text in (
        ("validation/loss", f"validation loss{of_v}"),
        ("validation/loss_terminal", f"validation loss at the last timestep{of_v}"),
        ("preview/luminance_error", "previews' distance to the luminance asked for"),
    ):
        if series := values.get(name):
            ends = [series[0], series[-1]] if len(series) > 1 else series
            items[text] = " \u2192 ".join(f"{value:.3g}" for value in ends)
    if speed := values.get("train/images_per_s"):
        items["throughput"] = f"{statistics.median(speed):.3g} images/s (median)"
    if waiting := values.get("train/data_wait_share"):
        items["waiting for data"] = f"{statistics.median(waiting):.1%} of the time (median)"
    for name, text in (
        ("memory/process_peak_gb", "peak memory of the process"),
        ("memory/gpu_allocated_peak_gb", "peak memory of the GPU, allocated"),
    ):
        if series := values.get(name):
            items[text] = f"{max(series):.2f} GB"
    return items


def run_figures(metrics: Series, prompts: Sequence[str] = ()) -> list[Figure]:
    """Draws the plots of a run; those without rows are left out."""
    differ = own_validation(metrics) is not None
    spaces = (" Both are of the network's own output.", " Validation is of v, training not.")
    drawn = (
        (
            "The black point as it trains",
            "Mean luminance of the previews at each step; dashed: what the prompt asks for, in the "
            "whole image or, where it names a background, in the border.",
            run_plots.black_point(metrics, prompts),
        ),
        (
            "Loss of the fine-tune",
            "Faint: each row, the mean since the row before. Training and validation loss are "
            "without loss weights; validation is of the averaged weights, if there are any."
            + spaces[0]
            * differ,
            run_plots.loss_curves(metrics),
        ),
        (
            "Loss by signal-to-noise ratio",
            "By the natural logarithm of the SNR; terminal is the last timestep alone, pure noise "
            "at zero terminal SNR, where the loss cannot reach 0." + spaces[1] * differ,
            run_plots.loss_by_snr(metrics),
        ),
        ("Gradient and learning rate", "", run_plots.optimizer_curves(metrics)),
        ("Weights and their average", "", run_plots.weight_curves(metrics)),
        (
            "Speed",
            "Validation, previews and checkpoints are left out of both. Waiting is time inside the "
            "loader's next().",
            run_plots.speed_curves(metrics),
        ),
        ("Memory", "Without the processes that decode images.", run_plots.memory_curves(metrics)),
    )
    return [Figure(title, svg, caption) for title, caption, svg in drawn if svg is not None]


def chosen_grids(folder: Path) -> list[tuple[str, Path]]:
    """Chooses a few preview grids from the first to the last, with their step as label."""
    grids = spread(sorted(folder.glob("step_*.png")), NUM_GRIDS)
    return [(f"step {int(grid.stem.removeprefix('step_'))}", grid) for grid in grids]


def shown_settings(tree: Mapping[str, object]) -> dict[str, str]:
    """Flattens a resolved config to dotted keys and text."""
    lists = {k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in flat(tree).items()}
    return {key: "not set" if value is None else str(value) for key, value in lists.items()}
