"""Shift x multi-scale loss in pixel space, on real digits: python -m
blackpoint.scripts.studies.pixel_study.

Four arms (neither, the shift, the multi-scale loss, both) of one class-conditional model, trained
from random weights on MNIST digits at 32 px with the same seeds, and so the same initial weights,
batches, t and eps. Each model samples the same classes from the same seeds; KID is the distance of
a classifier's features of them from those of held-out digits (Binkowski et al. 2018).

Every run resumes or is skipped when it is done. seeds=[1] does a part, for a second process; the
page is written from all rows that are there.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import csv_text
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.transform import transform
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.pictures import caption_grid, to_picture
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digit_judge import DigitJudge, train_digit_judge
from blackpoint.scripts.miniature.digits import DIGIT_NAMES, Split, compose, mnist_digits
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.pixel_study_page import write_page
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.run import fit

YAML = "configs/tiny_pixel.yaml"
ARMS = {
    "neither": ["schedule.shift.base_resolution=null", "loss.pool_factors=[1]"],
    "shift": ["loss.pool_factors=[1]"],
    "multi-scale": ["schedule.shift.base_resolution=null"],
    "both": [],
}
NUM_PICTURED, SIDE_PX = 20, 32


@dataclass
class PixelStudyConfig:
    """How much is trained and sampled."""

    work: str = "runs/pixel_study"
    """Folder of the shards, the runs and the classifier."""
    output: str = "docs/pixel_study"
    """Folder of the rows, the page and the pictures."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the trainings: initial weights, order, t and eps."""
    max_steps: int = 1500
    """Optimizer steps of each run, 32 images each; 4,500 digits are there to train on."""
    num_samples: int = 1500
    """Samples of each model; KID is the mean over parts as large as the 500 held-out digits."""
    num_steps: int = 25
    """Sampling steps, DDIM, trailing."""
    guidance_scale: float = 1.0
    """Guidance of the samples; 1 is off."""


def study(config: PixelStudyConfig) -> None:
    """Runs what is missing and writes the page."""
    work, output = Path(config.work), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    splits: tuple[Split, ...] = ("train", "held_out")
    for split in splits:
        pack_digits(work, split)
    judge = load_judge(work / "judge.safetensors")
    real = digits_of("held_out")[0]
    if config.num_samples % len(real):
        raise UserError(
            f"num_samples={config.num_samples}: must be a multiple of the {len(real)} held-out "
            "digits"
        )
    for seed in config.seeds:
        for arm in ARMS:
            rows_file = work / "rows" / f"{arm}_{seed}.json"
            if not rows_file.is_file():
                row = measure(config, arm, seed, real, judge)
                rows_file.parent.mkdir(parents=True, exist_ok=True)
                rows_file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
                print(f"* {arm}, seed {seed}: KID {row['kid']:.5f}", flush=True)
    rows = [json.loads(p.read_text("utf-8")) for p in sorted((work / "rows").glob("*.json"))]
    write_whole(output / "rows.csv", csv_text(rows))
    write_page(output, rows, json.loads((work / "judge.json").read_text("utf-8")))


def measure(
    config: PixelStudyConfig,
    arm: str,
    seed: int,
    real: Tensor,
    judge: DigitJudge,
) -> dict[str, Any]:
    """Trains one model, samples it and returns its row."""
    work = Path(config.work)
    run_dir = work / "runs" / f"{arm}_{seed}"
    settings = [
        *ARMS[arm],
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"model.seed={seed}",
        f"data.shards={work / 'shards' / 'train'}",
        f"data.validation_shards={work / 'shards' / 'held_out'}",
        f"trainer.max_steps={config.max_steps}",
        f"trainer.checkpoint_every_steps={max(config.max_steps // 4, 1)}",
        f"trainer.validate_every_steps={config.max_steps}",
        "preview.every_steps=0",
        "wandb.enabled=false",
    ]
    fit(load(TrainConfig, [YAML, *settings]))
    model = DiffusionModel.load(run_dir)
    digits = torch.arange(config.num_samples) % len(DIGIT_NAMES)
    samples = model.sample(
        [DIGIT_NAMES[digit] for digit in digits.tolist()],
        seeds=list(range(config.num_samples)),
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=0.0,
        batch_size=50,
    )
    speeds = read_metrics(run_dir / "metrics.csv")["train/images_per_s"]
    pixels = (255 * samples).round().to(torch.uint8)
    names = [DIGIT_NAMES[digit] for digit in digits[:NUM_PICTURED].tolist()]
    pictures = [to_picture(image) for image in samples[:NUM_PICTURED]]
    caption_grid([f"{arm}, seed {seed}"], [pictures], names).save(
        Path(config.output) / f"samples_{arm}_{seed}.png"
    )
    return {
        "arm": arm,
        "seed": seed,
        "kid": kid(judge, real, pixels),
        "digits_read": (judge.read(pixels) == digits).double().mean().item(),
        "num_samples": config.num_samples,
        "max_steps": config.max_steps,
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
        "images_per_s": round(statistics.median(value for _, value in speeds), 1),
    }


@torch.inference_mode()
def kid(judge: DigitJudge, real: Tensor, fake: Tensor) -> float:
    """Returns the unbiased KID, the mean over parts of `fake` that are as large as `real`."""
    found = []
    for part in fake.split(len(real)):
        metric = KernelInceptionDistance(feature=judge, subsets=1, subset_size=len(real))
        for images, is_real in ((real, True), (part, False)):
            for chunk in images.split(250):
                metric.update(chunk, real=is_real)
        found.append(float(metric.compute()[0]))
    return statistics.mean(found)


def load_judge(path: Path) -> DigitJudge:
    """Loads the classifier, or trains it on the digits that the models are trained on."""
    judge = DigitJudge()
    if path.is_file():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    judge = train_digit_judge(*digits_of("train"))
    images, labels = digits_of("held_out")
    accuracy = {"digit": (judge.read(images) == labels).double().mean().item()}
    path.with_suffix(".json").write_text(json.dumps(accuracy, indent=1) + "\n", encoding="utf-8")
    save_file(judge.state_dict(), path)
    return judge


def digits_of(split: Split) -> tuple[Tensor, Tensor]:
    """Returns a split as the models see it, white on black: uint8 (N, 3, 32, 32), and labels."""
    masks, labels = mnist_digits(split)
    images = [Image.fromarray(compose(mask, "white", "black")) for mask in masks]
    size = (SIDE_PX, SIDE_PX)
    small = [transform(image, size, 0.5, 0.5, flip=False) for image in images]
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
