"""`python -m blackpoint.scripts.measurements.measure_pixel_cost`: what early down-sampling saves in
a pixel-space UNet.

One training step (forward, backward, AdamW) of the same UNet at 64 to 512 px, on the pixels
themselves and on patches of 4 x 4 (Hoogeboom et al. 2023, section 3.3). Parameters differ in the
first and last convolution alone. Every cell is a process of its own; those that are done are kept
and not run again. Writes docs/pixel_cost.md and .json.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.page import Page
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script, write_page

GB = 1e9


@dataclass
class PixelCostConfig:
    """Which sizes, and the network that is timed."""

    resolutions: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    """Sides of the images in px."""
    patches: list[int] = field(default_factory=lambda: [1, 4])
    """Early down-sampling; 1 is none."""
    channels: list[int] = field(default_factory=lambda: [64, 128, 256, 256])
    """Width of each level."""
    blocks: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Residual blocks of each level."""
    transformer_blocks: list[int] = field(default_factory=lambda: [0, 0, 0, 1])
    """Transformer blocks after each residual block of a level."""
    batch_size: int = 1
    """Images per step."""
    num_steps: int = 3
    """Timed steps of each cell, after one that is not counted."""
    num_threads: int = 1
    """Threads of torch."""
    output: str = "docs/pixel_cost"
    """The two files to write, without .md and .json."""


def measure(config: PixelCostConfig) -> dict[str, Any]:
    """Runs the cells that are missing in OUTPUT.json and returns its content."""
    path = Path(config.output).with_suffix(".json")
    settings = {k: v for k, v in asdict(config).items() if k not in ("resolutions", "patches")}
    settings.pop("output")
    results: dict[str, Any] = {"settings": settings, **describe_machine(), "cells": {}}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            results = before
    for resolution in config.resolutions:
        for patch in config.patches:
            name = f"{resolution} px, patch {patch}"
            if name not in results["cells"]:
                task = settings | {"resolution": resolution, "patch": patch}
                command = [
                    sys.executable,
                    "-m",
                    "blackpoint.scripts.measurements.measure_pixel_cost",
                    json.dumps(task),
                ]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise RunFailed(f"{name}: {result.stderr[-2000:]}")
                results["cells"][name] = json.loads(result.stdout.splitlines()[-1])
                print(f"{name}: {results['cells'][name]}", flush=True)
                write_whole(path, json.dumps(results, indent=1) + "\n")
    return results


def run_cell(task: dict[str, Any]) -> dict[str, Any]:
    """Times one cell in this process."""
    import torch

    from blackpoint.sampling.pixels.pixel_codec import PixelCodec
    from blackpoint.sampling.runtime.memory import process_peak_bytes
    from blackpoint.train.config.model_config import ModelConfig
    from blackpoint.train.pixel_model import build_unet

    torch.set_num_threads(task["num_threads"])
    model = ModelConfig(
        channels=task["channels"],
        blocks=task["blocks"],
        transformer_blocks=task["transformer_blocks"],
        patch=task["patch"],
        condition="none",
    )
    torch.manual_seed(0)
    before = process_peak_bytes()
    unet = build_unet(model, task["resolution"], 1).train()
    codec = PixelCodec(model.codec, model.patch)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    batch, side = task["batch_size"], task["resolution"]
    x, target = torch.randn(2, batch, 3, side, side)
    t, token = torch.randint(1000, (batch,)), torch.zeros(batch, 1, 1)
    seconds = []
    for _ in range(1 + task["num_steps"]):
        started_s = time.perf_counter()
        output = codec.to_pixels(unet(codec.to_channels(x), t, token).sample)
        (output - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started_s)
    return {
        "parameters, M": sum(parameter.numel() for parameter in unet.parameters()),
        "seconds": [round(step_s, 4) for step_s in seconds[1:]],
        "peak_bytes": process_peak_bytes() - before,
    }


def markdown(config: PixelCostConfig, results: dict[str, Any]) -> str:
    """Returns the page."""
    settings, cells = results["settings"], results["cells"]
    steps, growth = [], []
    for resolution in config.resolutions:
        whole = cells[f"{resolution} px, patch {config.patches[0]}"]
        for patch in config.patches:
            cell = cells[f"{resolution} px, patch {patch}"]
            seconds, peak = spread(cell), cell["peak_bytes"]
            saved = (spread(whole).value / seconds.value, whole["peak_bytes"] / peak)
            size = (f"{resolution} px", patch, cell["parameters"] / 1e6)
            steps.append((*size, seconds, peak / GB, *saved))
    for small, large in zip(config.resolutions, config.resolutions[1:], strict=False):
        for patch in config.patches:
            small_cell, large_cell = (cells[f"{side} px, patch {patch}"] for side in (small, large))
            ratios = (
                spread(large_cell).value / spread(small_cell).value,
                large_cell["peak_bytes"] / small_cell["peak_bytes"],
            )
            growth.append((f"{small}, {large} px", patch, *ratios))
    columns = {"image": "", "patch": "", "parameters, M": ".2f", "s per step": ".3g", "GB": ".2f"}
    columns |= {"time, patch 1 over this": ".1f", "memory": ".1f"}
    return Page(
        "What early down-sampling saves",
        [
            f"`python -m blackpoint.scripts.measurements.measure_pixel_cost` on "
            f"{results['date']} ({results['machine']}): one "
            f"training step of the same UNet, {settings['channels']} wide, {settings['blocks']} "
            "residual blocks, attention at the lowest level, batch "
            f"{settings['batch_size']}, float32, {settings['num_threads']} thread(s) of torch; on "
            "pixels (patch 1) and on patches. "
            f"Seconds are the median of {settings['num_steps']} steps, in brackets the fastest and "
            "the slowest; memory is the largest resident set less that of the imports, so it "
            "counts weights, gradients, moments and activations.",
            Table.of(columns, steps),
            "How the cost grows when the side doubles (4 would be the number of pixels):",
            Table.of({"from, to": "", "patch": "", "time": ".1f", "memory": ".1f"}, growth),
        ],
    ).markdown()


def spread(cell: dict[str, Any]) -> Estimate:
    """Returns the median of a cell's seconds, with the fastest and the slowest as its ends."""
    seconds = cell["seconds"]
    return Estimate(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def write(config: PixelCostConfig) -> None:
    """Measures, writes both files and prints the page."""
    write_page(config.output, markdown(config, measure(config)))


def main(argv: list[str]) -> int:
    """Measures, writes both files and prints the table; returns the exit status."""
    if argv and argv[0].startswith("{"):
        print(json.dumps(run_cell(json.loads(argv[0]))))
        return 0
    return run_script("measure_pixel_cost", lambda: write(load(PixelCostConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
