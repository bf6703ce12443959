"""Samples prompts to a folder: images, one JSON row per image, and a grid with captions.

The same command continues a stopped one: it generates the missing images.
"""

import json
import logging
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.signals import stop_if_asked
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.images.decode import BadImage
from blackpoint.data.images.pictures import open_picture
from blackpoint.sampling.options import SampleConfig
from blackpoint.sampling.pipelines.painter import Painter
from blackpoint.sampling.prompts.prompt_set import read_prompts
from blackpoint.sampling.runtime.picture_grid import caption_grid
from blackpoint.sampling.runtime.pictures import to_picture, write_png
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample_record import SampleRecord

log = logging.getLogger(__name__)

ROWS, GRID = "samples.jsonl", "grid.png"
GRID_MAX_PROMPTS, GRID_MAX_SEEDS = 32, 8
Job = tuple[int, int]
"""Index of the prompt, and seed."""


def sample_to_folder(config: SampleConfig) -> Path:
    """Writes images/, samples.jsonl, grid.png and sample.json to config.output; returns that.

    Nothing is written before the first batch is sampled, so wrong input leaves no folder behind.
    Images that are there are not generated again. Where none is missing, the checkpoint is loaded
    only if its name differs from the recorded one, to see that it is the same.
    """
    output = Path(config.output)
    prompts = read_prompts(config.prompts)
    seeds = list(dict.fromkeys(config.seeds))
    seeds = seeds or list(range(config.seed, config.seed + config.num_images))
    record = SampleRecord(config, prompts, seeds)
    width = len(str(len(prompts) - 1))
    files = {
        (index, seed): f"images/{index:0{width}}_{seed}.png"
        for index in range(len(prompts))
        for seed in seeds
    }
    for file in files.values():
        if (output / file).is_dir():
            raise UserError(f"{output / file} is a folder where an image belongs; remove it")
    missing = [job for job, file in files.items() if not (output / file).is_file()]
    if missing or record.is_of_another_name():
        model, digest = _load(config, record)
        if missing:
            _sample(config, model, digest, record, prompts, files, missing)
    rows = [
        {"prompt": prompts[index], "seed": seed, "file": file}
        for (index, seed), file in files.items()
    ]
    write_whole(output / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    if missing or not (output / GRID).is_file():
        rows_shown, seeds_shown = prompts[:GRID_MAX_PROMPTS], seeds[:GRID_MAX_SEEDS]
        pictures = [
            [_open(output / files[index, seed]) for seed in seeds_shown]
            for index in range(len(rows_shown))
        ]
        titles = [f"seed {seed}" for seed in seeds_shown]
        write_png(output / GRID, caption_grid(rows_shown, pictures, titles))
    return output


def _open(path: Path) -> Image.Image:
    try:
        return open_picture(path)
    except BadImage as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); remove it, and the same command "
            "generates it again"
        ) from error


def _load(config: SampleConfig, record: SampleRecord) -> tuple[Painter, str]:
    """Loads the checkpoint; returns it with its digest, which is that of the images there."""
    device = find_device(config.device)
    formats = record.settled_formats(device, partial(log.warning, "note: %s"))
    set_tf32(formats["tf32"])
    model = config.load_model(device, getattr(torch, formats["dtype"]))
    digest = model.digest()
    record.check_checkpoint(digest)
    return model, digest


def _prepare(model: Painter, config: SampleConfig) -> None:
    """Sets the requested timesteps and speed options on the model, and logs their notes."""
    for note in (
        model.process.respacing_note(config.timestep_spacing),
        model.prepare(config.attention, config.channels_last, config.compile),
    ):
        if note:
            log.warning("note: %s", note)
    model.process = model.process.respaced(config.timestep_spacing)


def _sample(
    config: SampleConfig,
    model: Painter,
    digest: str,
    record: SampleRecord,
    prompts: list[str],
    files: dict[Job, str],
    missing: list[Job],
) -> None:
    """Generates the missing images, batch by batch, and writes a row for each."""
    output = Path(config.output)
    _prepare(model, config)
    if len(missing) < len(files):
        there = len(files) - len(missing)
        log.warning("note: output=%s holds %d of %d images", output, there, len(files))
    options = config.sampling_options()
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("sampling", total=len(missing))
        for start in range(0, len(missing), config.batch_size):
            batch = missing[start : start + config.batch_size]
            texts, seeds = [prompts[index] for index, _ in batch], [seed for _, seed in batch]
            images = model.sample(texts, seeds, **options)
            pictures = [to_picture(image) for image in images]
            record.keep(digest)
            with (output / ROWS).open("a", encoding="utf-8") as rows:
                for job, picture in zip(batch, pictures, strict=True):
                    write_png(output / files[job], picture)
                    row = {"prompt": prompts[job[0]], "seed": job[1], "file": files[job]}
                    rows.write(json.dumps(row) + "\n")
            progress.advance(task, len(batch))
            stop_if_asked()


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
