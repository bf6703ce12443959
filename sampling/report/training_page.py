"""The report page of a training run: what it is of, previews, numbers at a glance, plots.

All of it comes from the records of the run, the series of metrics.csv and the grids in previews/.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.files.dotted import flat
from blackpoint.sampling.report import training_plots as run_plots
from blackpoint.sampling.report.page import (
    Facts,
    Figure,
    Gallery,
    Part,
    embedded,
    embedded_picture,
    opened,
    spread,
)
from blackpoint.sampling.report.training_series import Series, own_validation, smoothed
from blackpoint.sampling.runtime.picture_grid import pictures_of_grid

NUM_GRIDS, MOST_LINES, PICTURE_PX = 6, 16, 512


def subject(resolved: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a run is of, from its config and environment.json: checkpoint, data, command."""
    data, starts = resolved.get("data", {}), environment.get("starts") or [{}]
    mixture = data.get("mixture") or {}
    shards = data.get("shards") or ", ".join(part["shards"] for part in mixture.values())
    sizes = (data.get("resolution"), "px"), (starts[-1].get("images_per_step"), "images per step")
    size = [f"{count} {unit}" for count, unit in sizes if count]
    facts = {
        "checkpoint": resolved.get("checkpoint"),
        "data": "; ".join(filter(None, [shards, *size])),
        "command": environment.get("command"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def previews(folder: Path, prompts: Sequence[str], num_images: int) -> list[Part]:
    """Lays the previews out, a line for each prompt and image, a column for each step; grids of
    other prompts than `prompts` as they are."""
    files = spread(sorted(folder.glob("step_*.png")), NUM_GRIDS)
    steps = [f"step {int(file.stem.removeprefix('step_'))}" for file in files]
    grids = [pictures_of_grid(opened(file), len(prompts) or 1, num_images) for file in files]
    if not all(grids):
        return [Figure("", embedded(file), step) for file, step in zip(files, steps, strict=True)]
    lines = [
        (
            f"{prompt}, seed {seed}" if num_images > 1 else prompt,
            [embedded_picture(grid[row][seed], PICTURE_PX) for grid in grids if grid],
        )
        for row, prompt in enumerate(prompts)
        for seed in range(num_images)
    ]
    note = "A click enlarges; the slider uncovers the first step, arrow keys lead on."
    return [Gallery("", lines[:MOST_LINES], note, steps, before="first")] if files else []


def single_values(metrics: Series) -> dict[str, str]:
    """Returns the metrics that have one row and so no curve, as text."""
    rows = {name: series[0] for name, series in metrics.items() if len(series) == 1}
    return {name: f"{value:.4g} at step {step}" for name, (step, value) in rows.items()}


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


def run_figures(metrics: Series, prompts: Sequence[str] = ()) -> list[Part]:
    """Draws the plots of a run; metrics of one row are numbers below them."""
    differ = own_validation(metrics) is not None
    single = single_values(metrics)
    metrics = {name: series for name, series in metrics.items() if name not in single}
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
            "at zero terminal SNR. There v is -x0 and the input tells nothing of it, so the least "
            "loss is the variance of a prompt's images. It rises in validation, while others fall, "
            "where the network settles on the means of its training images, which held-out ones "
            "do not share; the black point is judged by the previews' luminance."
            + spaces[1]
            * differ,
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
    figures = [Figure(title, svg, caption) for title, caption, svg in drawn if svg is not None]
    return [*figures, Facts("Measured once", single)]


def shown_settings(tree: Mapping[str, object]) -> dict[str, str]:
    """Flattens a resolved config to dotted keys and text."""
    lists = {k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in flat(tree).items()}
    return {key: "not set" if value is None else str(value) for key, value in lists.items()}
