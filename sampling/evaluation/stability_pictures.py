"""Paints noises of a stability study again, by their seeds, for sets and for the gallery."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.stability_arms import POOL, arms
from blackpoint.sampling.evaluation.stability_rows import Found
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.search.folder import SETTINGS, settled_formats
from blackpoint.sampling.search.journal import read_rows
from blackpoint.sampling.search.setup import note
from blackpoint.sampling.search.winners import WINNERS

SHOWN_PROMPTS = 8


def painted(found: Found, pairs: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    """Paints (row of the prompt, noise) pairs; yields batches (N, 3, H, W) in order."""
    config = found.config
    device = find_device(config.device)
    asked = {"dtype": config.dtype, "tf32": config.tf32}
    pool = Path(config.output) / found.place.folder / POOL / SETTINGS
    formats = settled_formats(asked, pool, device, note)
    set_tf32(formats["tf32"])
    dtype = getattr(torch, formats["dtype"])
    checkpoint = config.checkpoints[found.place.checkpoint]
    model = DiffusionModel.load(checkpoint, device, dtype, config.weights)
    prepare_unet(model.unet, config.attention, config.channels_last, False)
    for start in track(range(0, len(pairs), config.batch_size), "painting"):
        chunk = pairs[start : start + config.batch_size]
        yield model.sample(
            [found.pool.texts[row] for row, _ in chunk],
            [int(found.pool.seeds[pair]) for pair in chunk],
            found.place.num_steps,
            config.guidance_scale,
            config.guidance_rescale,
            height=config.height,
            width=config.width,
            batch_size=config.batch_size,
        )


def gallery(found: Found, folder: Path) -> tuple[list[str], list[tuple[str, list[Path]]]]:
    """Returns captions, and lines of pictures of the same prompts by noise; kept in `folder`."""
    first = found.stability[0]
    values = found.pool.scores[first]
    finite = np.isfinite(values)
    numbers = {
        "random noise": np.zeros(len(values), dtype=int),
        "least stable": np.where(finite, values, np.inf).argmin(axis=1),
        "most stable": np.where(finite, values, -np.inf).argmax(axis=1),
    }
    rows = list(range(len(values)))[:: max(1, len(values) // SHOWN_PROMPTS)][:SHOWN_PROMPTS]
    wanted = [
        ((row, int(each[row])), folder / f"{row:03d}_{found.pool.seeds[row, each[row]]}.png")
        for name, each in numbers.items()
        for row in rows
    ]
    missing = [(pair, path) for pair, path in wanted if not path.is_file()]
    if missing:
        images = torch.cat(list(painted(found, [pair for pair, _ in missing])))
        for image, (_, path) in zip(images, missing, strict=True):
            content = io.BytesIO()
            to_picture(image).save(content, "PNG")
            write_whole(path, content.getvalue())
    lines = [
        (name, [path for _, path in wanted[place : place + len(rows)]])
        for name, place in zip(numbers, range(0, len(wanted), len(rows)), strict=True)
    ]
    return [found.pool.texts[row] for row in rows], lines + _ascents(found, rows)


def _ascents(found: Found, rows: Sequence[int]) -> list[tuple[str, list[Path]]]:
    lines = []
    for arm in arms(found.config, found.place):
        if arm.config.algorithm != "noise_optimisation":
            continue
        folder = Path(arm.config.output)
        winners = {
            row["prompt_index"]: folder / row["image"]
            for row in read_rows(folder / WINNERS, repair=False)
        }
        name = arm.name.removeprefix("optimise_").replace("_", " ")
        lines.append((f"optimised, {name}", [winners[found.pool.prompts[row]] for row in rows]))
    return lines
