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

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.scripts.config import load
from blackpoint.scripts.measurements.full_architecture_table import describe_machine

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
    """Images a step."""
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
    found: dict[str, Any] = {"settings": settings, **describe_machine(), "cells": {}}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            found = before
    for resolution in config.resolutions:
        for patch in config.patches:
            name = f"{resolution} px, patch {patch}"
            if name not in found["cells"]:
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
                found["cells"][name] = json.loads(result.stdout.splitlines()[-1])
                print(f"{name}: {found['cells'][name]}", flush=True)
                write_whole(path, json.dumps(found, indent=1) + "\n")
    return found


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
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "seconds": [round(each, 4) for each in seconds[1:]],
        "peak_bytes": process_peak_bytes() - before,
    }


def markdown(config: PixelCostConfig, found: dict[str, Any]) -> str:
    """Returns the page."""
    settings, cells = found["settings"], found["cells"]
    lines = [
        "# What early down-sampling saves",
        "",
        f"`python -m blackpoint.scripts.measurements.measure_pixel_cost` on {found['date']} ({found['machine']}): one "
        f"training step of the same UNet, {settings['channels']} wide, {settings['blocks']} "
        f"residual blocks, attention at the lowest level, batch {settings['batch_size']}, float32, "
        f"{settings['num_threads']} thread(s) of torch; on pixels (patch 1) and on patches. "
        f"Seconds are the median of {settings['num_steps']} steps, in brackets the fastest and the "
        "slowest; memory is the largest resident set less that of the imports, so it counts "
        "weights, gradients, moments and activations.",
        "",
        "| image | patch | parameters | s a step | GB | time, patch 1 over this | memory |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for resolution in config.resolutions:
        whole = cells[f"{resolution} px, patch {config.patches[0]}"]
        for patch in config.patches:
            cell = cells[f"{resolution} px, patch {patch}"]
            low, middle, high = _spread(cell)
            lines.append(
                f"| {resolution} px | {patch} | {cell['parameters'] / 1e6:.2f} M | {middle:.3g} "
                f"[{low:.3g}, {high:.3g}] | {cell['peak_bytes'] / GB:.2f} | "
                f"{_spread(whole)[1] / middle:.1f} | "
                f"{whole['peak_bytes'] / cell['peak_bytes']:.1f} |"
            )
    lines += ["", "How the cost grows when the side doubles (4 would be the number of pixels):", ""]
    lines += ["| from, to | patch | time | memory |", "|--:|--:|--:|--:|"]
    pairs = zip(config.resolutions, config.resolutions[1:], strict=False)
    for small, large in pairs:
        for patch in config.patches:
            one, two = (cells[f"{side} px, patch {patch}"] for side in (small, large))
            lines.append(
                f"| {small}, {large} px | {patch} | {_spread(two)[1] / _spread(one)[1]:.1f} | "
                f"{two['peak_bytes'] / one['peak_bytes']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _spread(cell: dict[str, Any]) -> tuple[float, float, float]:
    seconds = cell["seconds"]
    return min(seconds), statistics.median(seconds), max(seconds)


def main(argv: list[str]) -> int:
    """Measures, writes both files and prints the table; returns the exit status."""
    if argv and argv[0].startswith("{"):
        print(json.dumps(run_cell(json.loads(argv[0]))))
        return 0
    try:
        config = load(PixelCostConfig, argv)
        text = markdown(config, measure(config))
    except (UserError, RunFailed) as error:
        print(f"measure_pixel_cost: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    Path(config.output).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
