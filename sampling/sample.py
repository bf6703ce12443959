"""Samples prompts to a folder: pictures, one JSON row a picture, and a grid with captions."""

import json
import logging
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sampling.config import SampleConfig
from sampling.errors import UserError
from sampling.export import require_empty
from sampling.model import DiffusionModel
from sampling.pictures import caption_grid, to_picture
from sampling.precision import set_tf32, settle
from sampling.prompts import read_prompts
from sampling.speed import prepare_unet
from sampling.tasks import Task

log = logging.getLogger(__name__)

GRID_MAX_PROMPTS, GRID_MAX_SEEDS = 32, 8


def sample_to_folder(config: SampleConfig) -> Path:
    """Writes images/, samples.jsonl and grid.png to config.output and returns that folder.

    Nothing is written before the first batch is sampled, so wrong input leaves no folder behind.
    """
    output = Path(config.output)
    require_empty(output)
    prompts = read_prompts(config.prompts)
    seeds = list(dict.fromkeys(config.seeds))
    seeds = seeds or list(range(config.seed, config.seed + config.num_images))
    device = find_device(config.device)
    asked = {"dtype": config.dtype, "tf32": config.tf32}
    formats = settle(f"output={output}", asked, device, partial(log.warning, "note: %s"))
    set_tf32(formats["tf32"])
    dtype = getattr(torch, formats["dtype"])
    model = DiffusionModel.load(
        config.checkpoint, device, dtype, config.weights, variant=config.variant
    )
    choice = prepare_unet(model.unet, config.attention, config.channels_last, config.compile)
    if choice:
        log.warning("note: %s", choice)
    jobs = [(index, seed) for index in range(len(prompts)) for seed in seeds]
    width = len(str(len(prompts) - 1))
    files: dict[tuple[int, int], str] = {}
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("sampling", total=len(jobs))
        for start in range(0, len(jobs), config.batch_size):
            batch = jobs[start : start + config.batch_size]
            images = model.sample(
                [prompts[index] for index, _ in batch],
                seeds=[seed for _, seed in batch],
                num_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                guidance_rescale=config.guidance_rescale,
                sampler=config.sampler,
                eta=config.eta,
                guidance_interval=config.guidance().interval,
                height=config.height,
                width=config.width,
                negative_prompt=config.negative_prompt,
                batch_size=config.batch_size,
                allow_unsound=config.allow_unsound,
                clip_skip=config.clip_skip,
            )
            (output / "images").mkdir(parents=True, exist_ok=True)
            with (output / "samples.jsonl").open("a", encoding="utf-8") as rows:
                for (index, seed), image in zip(batch, images, strict=True):
                    file = f"images/{index:0{width}}_{seed}.png"
                    to_picture(image).save(output / file)
                    files[index, seed] = file
                    row = {"prompt": prompts[index], "seed": seed, "file": file}
                    rows.write(json.dumps(row) + "\n")
            progress.advance(task, len(batch))
    rows_shown, seeds_shown = prompts[:GRID_MAX_PROMPTS], seeds[:GRID_MAX_SEEDS]
    grid = caption_grid(
        rows_shown,
        [
            [Image.open(output / files[index, seed]) for seed in seeds_shown]
            for index in range(len(rows_shown))
        ],
        [f"seed {seed}" for seed in seeds_shown],
    )
    grid.save(output / "grid.png")
    return output


def find_device(name: str, task: Task | None = None) -> torch.device:
    """Returns the device called `name`; auto takes a GPU where there is one, each task its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and task is not None and task.count > 1:
            name = f"cuda:{task.local_rank % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} is not usable here ({reason}); use auto or cpu") from None
    return torch.device(name)
