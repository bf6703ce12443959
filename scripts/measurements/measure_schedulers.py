"""`python -m blackpoint.scripts.measurements.measure_schedulers`: what diffusers' schedulers make
of a zero-SNR export.

The export of the demo's fine-tune, sampled by stock diffusers with the schedulers that the model
card names, as its users would: `Scheduler.from_config(pipe.scheduler.config)`. Three cells (the
background left open, black, white), the same prompts and seeds for every scheduler, and beside each
picture that of `DiffusionModel.sample(sampler="ddim")`. DDIM also at numbers of steps that do not
divide T, where it leaves the timestep list.

Writes docs/schedulers.md and, one row per image, docs/schedulers.csv.gz; goes on where it stopped.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from blackpoint.sampling.export.client_schedulers import DROP_ZERO_SNR, RIGHT_AT_ZERO_SNR
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.pixels.luminance import border_luminance
from blackpoint.sampling.prompts.prompt_set import read_prompt_set
from blackpoint.sampling.report.page import Page
from blackpoint.sampling.statistics import estimates as statistics
from blackpoint.sampling.statistics.table import Table, read_csv, write_csv
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script, write_page

PROMPTS = "configs/prompts/digits.jsonl"
GUIDANCE = {"black": (3.0, 0.7), "white": (3.0, 0.7), "open": (1.0, 0.0)}
OURS, DDIM, UNEVEN_CELL = "blackpoint ddim", "DDIMScheduler", "black"
FORMAT = ".4f n"
KEEP = RIGHT_AT_ZERO_SNR[:4]
"""Those that draw no noise while they sample."""


@dataclass
class SchedulerStudyConfig:
    """What is sampled, and where the figures go."""

    checkpoint: str = "runs/demo/export"
    """Export of configs/tiny_zero_snr.yaml, such as that of `make demo`."""
    num_images: int = 10
    """Pictures of black and of white backgrounds; twice as many leave it open."""
    num_steps: int = 25
    """Sampling steps."""
    uneven_steps: tuple[int, int, int] = (7, 30, 61)
    """Numbers of steps that do not divide T, for DDIM and black backgrounds alone; at 61 the list
    of diffusers has a surplus timestep."""
    seed: int = 0
    """Seed of picture 0 of every cell; picture i has seed + i."""
    output: str = "docs/schedulers"
    """Writes this name with .md and .csv.gz."""


@dataclass(frozen=True)
class Row:
    """One picture; luminance and pixels in [0, 1]."""

    scheduler: str
    cell: str
    num_steps: int
    index: int
    seed: int
    prompt: str
    border: float
    """Luminance of the outer two rows and columns; NaN where the picture has NaN."""
    difference: float
    """Mean absolute difference of pixels from our ddim."""
    largest: float
    """Largest absolute difference."""

    @property
    def part(self) -> tuple[str, str, int]:
        return self.scheduler, self.cell, self.num_steps


def parts(config: SchedulerStudyConfig) -> Iterator[tuple[str, str, int]]:
    """Yields scheduler, cell and steps of all that is sampled."""
    for cell in GUIDANCE:
        for name in (*KEEP, *DROP_ZERO_SNR):
            yield name, cell, config.num_steps
    for num_steps in config.uneven_steps:
        yield DDIM, UNEVEN_CELL, num_steps


def measure(config: SchedulerStudyConfig) -> list[Row]:
    """Samples what is not in the rows file yet; returns all rows."""
    path = Path(config.output).with_suffix(".csv.gz")
    rows = read_csv(path, Row) if path.is_file() else []
    done = {row.part for row in rows}
    missing = [part for part in parts(config) if part not in done]
    if not missing:
        return rows
    model = DiffusionModel.load(config.checkpoint)
    pipeline = StableDiffusionPipeline.from_pretrained(config.checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    base_scheduler = pipeline.scheduler.config
    kept: dict[tuple[str, int], Tensor] = {}
    for name, cell, num_steps in missing:
        captions = [entry.text for entry in read_prompt_set(PROMPTS) if entry.category == cell]
        count = config.num_images * (2 if cell == "open" else 1)
        prompts = [captions[index % len(captions)] for index in range(count)]
        seeds = [config.seed + index for index in range(count)]
        scale, rescale = GUIDANCE[cell]
        if (cell, num_steps) not in kept:
            kept[cell, num_steps] = model.sample(prompts, seeds, num_steps, scale, rescale)
        ours = kept[cell, num_steps]
        pipeline.scheduler = getattr(diffusers, name).from_config(base_scheduler)
        images = pipeline(
            prompts,
            num_inference_steps=num_steps,
            guidance_scale=scale,
            guidance_rescale=rescale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        rows += as_rows((name, cell, num_steps), seeds, prompts, images, ours)
        if name == DDIM:
            rows += as_rows((OURS, cell, num_steps), seeds, prompts, ours, ours)
        write_csv(path, rows)
        print(f"{name} {cell}, {num_steps} steps", flush=True)
    return rows


def as_rows(
    part: tuple[str, str, int], seeds: list[int], prompts: list[str], images: Tensor, ours: Tensor
) -> list[Row]:
    """Measures pictures (N, 3, H, W)."""
    apart = (images - ours).abs().flatten(1)
    columns = (border_luminance(images), apart.mean(dim=1), apart.amax(dim=1))
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Row(*part, index, seed, prompt, *(round(value, 5) for value in measured))
        for index, (seed, prompt, measured) in enumerate(zip(seeds, prompts, values, strict=True))
    ]


def page(config: SchedulerStudyConfig, rows: list[Row]) -> str:
    """Writes the page."""
    machine = describe_machine()
    flags = dict.fromkeys(KEEP, "kept") | dict.fromkeys(DROP_ZERO_SNR, "dropped")
    schedulers = []
    for name in (OURS, *flags):
        name_rows = [
            row for row in rows if row.scheduler == name and row.num_steps == config.num_steps
        ]
        borders = {cell: [row.border for row in name_rows if row.cell == cell] for cell in GUIDANCE}
        apart = None if name == OURS else statistics.mean([row.difference for row in name_rows])
        means = [statistics.mean(borders[cell]) for cell in ("black", "white")]
        schedulers.append((name, flags.get(name), *means, statistics.std(borders["open"]), apart))
    black, white = (
        statistics.mean(
            [
                mean(r.border for r in rows if is_dropped(r, cell) and r.index == index)
                for index in range(config.num_images)
            ]
        )
        for cell in ("black", "white")
    )
    uneven = []
    for num_steps in (config.num_steps, *config.uneven_steps):
        at_steps = [row for row in rows if row.part == (DDIM, UNEVEN_CELL, num_steps)]
        measured = zip(
            *((row.border, row.difference, row.largest) for row in at_steps), strict=True
        )
        uneven.append((num_steps, *map(statistics.mean, measured)))
    borders_of = ["black: border", "white: border", "open: std of border", "difference"]
    columns = {"scheduler": "", "flag": "", **dict.fromkeys(borders_of, FORMAT)}
    differences = dict.fromkeys(["border", "mean difference", "largest difference"], FORMAT)
    return Page(
        "diffusers' schedulers on a zero-SNR model, measured",
        [
            f"`python -m blackpoint.scripts.measurements.measure_schedulers` on "
            f"{machine['date']} ({machine['machine']}; "
            f"diffusers {machine['versions']['diffusers']}): the export of "
            f"`configs/tiny_zero_snr.yaml` (64 px) in stock diffusers, {config.num_steps} steps, "
            f"pictures i = 0 to n - 1 of seed {config.seed} + i. Border: the outer two rows and "
            "columns, luminance 0 to 1. Open captions at guidance 1; black and white at guidance "
            "3, rescale .7. Difference: mean absolute difference of pixels in [0, 1] from "
            "`DiffusionModel.sample` with ddim, all three cells. "
            "Value [95 % bootstrap interval] n. Rows: [schedulers.csv.gz](schedulers.csv.gz).",
            Table.of(columns, schedulers),
            f"Over the {len(DROP_ZERO_SNR)} that drop the flag: black {black:{FORMAT}}, "
            f"white {white:{FORMAT}} (a picture's mean over them counts once). They start at the "
            "noise that the network was trained on at the last timestep and have other noise "
            "levels between: their pictures differ from ours, but are not gray.",
            "DDIM by number of steps, black backgrounds: border, and the mean and largest "
            "difference of a picture's pixels from ours, mean over pictures.",
            Table.of({"steps": "", **differences}, uneven),
        ],
    ).markdown()


def is_dropped(row: Row, cell: str) -> bool:
    """Whether a scheduler made the picture that drops the flag."""
    return row.scheduler in DROP_ZERO_SNR and row.cell == cell


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    config = load(SchedulerStudyConfig, argv)
    return run_script(
        "measure_schedulers", lambda: write_page(config.output, page(config, measure(config)))
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
