"""Shift x multi-scale loss in pixel space, on real digits: python -m
blackpoint.scripts.studies.pixel_study.

configs/pixel_study.yaml trains one class-conditional model with neither, either and both, from
random weights on MNIST digits at 32 px. At one seed all have the same batches, t and eps. KID is
the distance of a classifier's features of the samples from those of held-out digits (Binkowski et
al. 2018). Effects are contrasts of the four settings, paired over seeds: with k seeds their mean
has the interval of Student's t with k - 1 degrees of freedom.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.transform import transform
from blackpoint.sampling.report.results import Results
from blackpoint.sampling.report.results_page import table_files
from blackpoint.sampling.report.results_tables import CHANGE, marked_change
from blackpoint.sampling.runtime.picture_grid import caption_grid
from blackpoint.sampling.statistics.estimates import paired_mean, smallest_detectable_effect
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digit_judge import DigitJudgeClasses, train_digit_judge
from blackpoint.scripts.miniature.digit_readers import WEIGHTS_NAME, save_weights
from blackpoint.scripts.miniature.digits import DIGIT_NAMES, Split, compose, mnist_digits
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.study import run_study

YAML, RUN_DIR = "configs/pixel_study.yaml", Path("runs/pixel_study")
METRICS = ("KID", "digits")
SIDE_PX = 32
NEITHER, SHIFT, SCALES, BOTH = "neither", "shift", "multi-scale", "both"
EFFECTS: dict[str, dict[str, float]] = {
    "shift, mean of with and without multi-scale": {
        SHIFT: 0.5, NEITHER: -0.5, BOTH: 0.5, SCALES: -0.5
    },
    "multi-scale, mean of with and without shift": {
        SCALES: 0.5, NEITHER: -0.5, BOTH: 0.5, SHIFT: -0.5
    },
    "shift alone": {SHIFT: 1, NEITHER: -1},
    "multi-scale alone": {SCALES: 1, NEITHER: -1},
    "multi-scale, given the shift": {BOTH: 1, SHIFT: -1},
    "both": {BOTH: 1, NEITHER: -1},
    "interaction": {BOTH: 1, SHIFT: -1, SCALES: -1, NEITHER: 1},
}  # fmt: skip
"""Effect -> weight of each setting."""


@dataclass
class PixelStudyConfig:
    """How much is run at once, and where the tables go."""

    num_processes: int = 2
    """Cells that are run at once."""
    output: str = "docs/pixel_study"
    """Folder of the tables and the pictures."""


def study(config: PixelStudyConfig) -> None:
    """Runs what is missing and keeps the tables."""
    splits: tuple[Split, ...] = ("train", "held_out")
    for split in splits:
        pack_digits(RUN_DIR, split)
    make_judge(RUN_DIR / "judge")
    results = run_study(YAML, config.output, config.num_processes, METRICS)
    output = Path(config.output)
    for name, content in table_files([effects(results)]).items():
        write_whole(output / name, content)
    for cell in results.cells:
        if cell.varied.get("train.seed") == 0:
            keys = [key for key in sorted(cell.pictures) if key[2] < 2]
            pictures = [[Image.open(cell.pictures[key].path) for key in keys]]
            captions = [prompt for _, prompt, _ in keys]
            grid = caption_grid([f"{cell.arm}, seed 0"], pictures, captions)
            grid.save(output / f"samples_{cell.arm}_0.png")


def effects(results: Results) -> Table:
    """Returns the contrasts of the settings by every metric."""
    rows = []
    for metric in METRICS:
        values: dict[int, dict[str, float]] = {}
        for cell in results.cells:
            if metric in cell.values:
                of_seed = values.setdefault(cell.varied["train.seed"], {})
                of_seed[cell.arm] = cell.values[metric].estimate.value
        whole = [
            of_seed for of_seed in values.values() if len(of_seed) == len(EFFECTS["interaction"])
        ]
        for name, weights in EFFECTS.items() if len(whole) > 1 else ():
            changes = [contrast(of_seed, weights) for of_seed in whole]
            rows.append(
                {"metric": metric, "effect": name, "change": marked_change(paired_mean(changes))}
                | {"would have shown": smallest_detectable_effect(changes)}
            )
    note = (
        "Paired over seeds; 95 % intervals of Student's t. Would have shown: the smallest effect "
        "that so many seeds find with power 0.8. Bold: the interval leaves out 0."
    )
    columns = {"metric": "", "effect": "", "change": CHANGE, "would have shown": ".2g"}
    return Table(rows, columns, "Effects", note, "effects")


def contrast(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Returns the weighted sum of the values of settings."""
    return sum(weight * values[setting] for setting, weight in weights.items())


def make_judge(folder: Path) -> None:
    """Trains the classifier on the digits that the models are trained on, unless it is there."""
    if (folder / WEIGHTS_NAME).is_file():
        return
    save_weights(train_digit_judge(*digits_of("train")), folder)
    judge = DigitJudgeClasses.load(folder)
    images, labels = digits_of("held_out")
    with torch.inference_mode():
        right = torch.cat([judge(part).argmax(dim=1) for part in images.split(250)]) == labels
    print(f"judge: {right.double().mean():.1%} of {len(labels)} held-out digits", flush=True)


def digits_of(split: Split) -> tuple[Tensor, Tensor]:
    """Returns a split as the models see it, white on black: uint8 (N, 3, 32, 32), and labels."""
    masks, labels = mnist_digits(split)
    images = [Image.fromarray(compose(mask, "white", "black")) for mask in masks]
    small = [transform(image, (SIDE_PX, SIDE_PX), 0.5, 0.5, flip=False) for image in images]
    pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels)


def pack_digits(work: Path, split: Split, num_images: int | None = None) -> None:
    """Writes digits of a split, evenly chosen or all, captioned with their names; packs them."""
    shards, folder = work / "shards" / split, work / "digits" / split
    if shards.exists():  # data pack makes it only when it is whole
        return
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = digits_of(split)  # sorted by class
    chosen = torch.linspace(0, len(images) - 1, num_images or len(images)).round().long()
    images, labels = images[chosen], labels[chosen]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{number:06d}"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(DIGIT_NAMES[int(label)] + "\n", encoding="ascii")
    shards.parent.mkdir(parents=True, exist_ok=True)
    pack(PackConfig(source=str(folder), output=str(shards)))


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("pixel_study", lambda: study(load(PixelStudyConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
