"""The black-point study: can a checkpoint paint true black and true white, and can it still draw?

Sampling starts from noise of mean 0, while a schedule with terminal alpha_T > 0 was trained on
noise plus alpha_T times the image's mean, so such a model paints every image near a middle gray
(Lin et al. 2023). Three questions, every checkpoint with the same prompts and seeds:

(a) open:         captions that leave the background open, guidance 1: is border luminance as varied
                  as in the data?
(b) black, white: captions that name it, at several guidance scales: how black, how white is the
                  border?
(c) digits:       all captions, one guidance scale: does a classifier trained on real digits read
                  what was asked for?

This file says what is sampled; black_point_study.py samples it, black_point_summary.py concludes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.choices import check_seed
from blackpoint.sampling.report.rows import DATA


@dataclass
class BlackPointConfig:
    """The black-point study of one or more checkpoints."""

    study: Literal["black_point"] = "black_point"
    """Which study: metrics, black_point or stability; `study=NAME --help` lists another's keys."""
    checkpoints: dict[str, PathText] = MISSING
    """Name -> checkpoint (a folder, hub id, run directory or .ckpt); the first is the one compared
    with."""
    brief: list[str] = field(default_factory=list)
    """Names of checkpoints of which only the open cell is sampled."""
    output: OutputText = "runs/black_point"
    """Folder for rows.csv.gz, summary.md, summary.json and sample images."""
    digit_reader: PathText = "assets/digit_reader"
    """Folder of the digit classifier."""
    num_images: int = 500
    """Images in the open cell of (a)."""
    border_images: int = 500
    """Images in black and in white at read_guidance_scale."""
    beside_images: int = 250
    """Images in black and in white at each other guidance scale, which are shown beside."""
    read_images: int = 2000
    """Images whose digits are read in (c); they include the black and white cells at
    read_guidance_scale."""
    reference_images: int = 2000
    """Real held-out images that the samples are compared with."""
    gallery_images: int = 10
    """Images of each cell that are kept as PNG files for the report."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0, 5.0, 7.5])
    """Guidance scales of (b); 1 is no guidance."""
    read_guidance_scale: float = 3.0
    """Guidance scale of (c), one of guidance_scales."""
    guidance_rescale: float = 0.7
    """Guidance rescale of every guided cell (0 to 1)."""
    num_steps: int = 25
    """Sampling steps."""
    sampler: str = "ddim"
    """Sampler, run on each checkpoint's own schedule and timestep spacing."""
    seed: int = 0
    """Seed of image 0 of every cell; image i has seed + i."""
    batch_size: int = 50
    """Images sampled at once."""
    num_processes: int = 2
    """Processes that share the work; they also share the processor cores."""
    allow_unsound: bool = False
    """Sample checkpoints whose process cannot work, for a comparison; the report says so."""

    def __post_init__(self) -> None:
        if isinstance(self.checkpoints, dict) and DATA in self.checkpoints:
            raise UserError(
                f"checkpoints: the name {DATA!r} is kept for real images; choose another"
            )
        if isinstance(self.checkpoints, dict) and not set(self.brief) <= set(self.checkpoints):
            raise UserError(
                f"brief={self.brief} names what checkpoints does not: {', '.join(self.checkpoints)}"
            )
        if self.read_guidance_scale not in self.guidance_scales:
            raise UserError(
                f"read_guidance_scale={self.read_guidance_scale} is not among guidance_scales="
                f"{self.guidance_scales}; add it there"
            )
        for name in (
            "num_images",
            "border_images",
            "beside_images",
            "read_images",
            "num_steps",
            "batch_size",
            "num_processes",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        check_seed("seed", self.seed, max(self.num_images, self.border_images, self.read_images))
        if self.num_images < 2:
            raise UserError("num_images=1 has no standard deviation; give at least 2")


Caption = tuple[str, int]  # (prompt, the digit that it names)


@dataclass(frozen=True)
class Captions:
    """The captions of the data, by what they say of the background."""

    open: Sequence[Caption]
    black: Sequence[Caption]
    white: Sequence[Caption]
    other: Sequence[Caption]


@dataclass(frozen=True)
class Cell:
    """Images that share a group of captions and the guidance."""

    group: str
    guidance_scale: float
    guidance_rescale: float
    captions: Sequence[Caption]
    num_images: int

    @property
    def name(self) -> str:
        """Names the cell, for example `black_g3`."""
        return f"{self.group}_g{self.guidance_scale:g}"


def study_cells(config: BlackPointConfig, captions: Captions, checkpoint: str) -> list[Cell]:
    """Lists the cells of one checkpoint: open, then black and white at each guidance, then what
    (c) needs besides."""

    def cell(group: str, guidance_scale: float, num_images: int) -> Cell:
        rescale = 0.0 if guidance_scale == 1 else config.guidance_rescale
        return Cell(group, guidance_scale, rescale, getattr(captions, group), num_images)

    cells = [cell("open", 1.0, config.num_images)]
    if checkpoint in config.brief:
        return cells
    for scale in config.guidance_scales:
        at_read = scale == config.read_guidance_scale
        count = config.border_images if at_read else config.beside_images
        cells += [cell(group, scale, count) for group in ("black", "white")]
    num_other = config.read_images - 2 * config.border_images
    if num_other > 0:
        cells.append(cell("other", config.read_guidance_scale, num_other))
    return cells


def wanted_keys(config: BlackPointConfig, captions: Captions) -> set[tuple[str, str, int]]:
    """Lists the keys of all rows of a study."""
    return {
        (name, cell.name, index)
        for name in config.checkpoints
        for cell in study_cells(config, captions, name)
        for index in range(cell.num_images)
    }


def image_path(output: Path, checkpoint: str, cell: str, index: int) -> Path:
    """Says where a kept image of a study lies."""
    return output / "images" / checkpoint / cell / f"{index:04d}.png"
