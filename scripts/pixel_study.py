"""Shift x multi-scale loss in pixel space, on real digits: python -m scripts.pixel_study.

Four arms (neither, the shift, the multi-scale loss, both) of configs/tiny_pixel.yaml, trained from
random weights with the same seeds, and so the same initial weights, batches, t and eps. Each model
samples the same prompts from the same seeds; KID is the distance of a classifier's features of them
from those of held-out images with the same captions (Binkowski et al. 2018).

Every run resumes or is skipped when it is done. seeds=[1] does a part, for a second process; the
page is written from all rows that are there.
"""

import csv
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from data.digits import digit_of, digit_samples
from data.transform import transform
from sampling.errors import UserError
from sampling.evaluation.digit_reader import DigitReader
from sampling.model import DiffusionModel
from sampling.pictures import caption_grid, to_picture
from scripts.config import load
from scripts.demo_steps import pack_digits
from scripts.pixel_study_page import write_page
from scripts.run_demo import DemoConfig
from train.config import TrainConfig
from train.digit_judge import DigitJudge, labels_of, train_digit_judge
from train.run import fit

YAML = "configs/tiny_pixel.yaml"
ARMS = {
    "neither": ["schedule.shift.base_resolution=null", "loss.pool_factors=[1]"],
    "shift": ["loss.pool_factors=[1]"],
    "multi-scale": ["schedule.shift.base_resolution=null"],
    "both": [],
}
DIGIT_READER = "assets/digit_reader"
NUM_PICTURED, SIDE_PX = 12, 32


@dataclass
class PixelStudyConfig:
    """How much is trained and sampled."""

    work: str = "runs/pixel_study"
    """Folder of the shards, the runs and the classifier."""
    output: str = "docs/pixel_study"
    """Folder of the rows, the page and the pictures."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the trainings: initial weights, order, t and eps."""
    max_steps: int = 1200
    """Optimizer steps of each run, 32 images each."""
    num_train_images: int = 16000
    """Composed training images, of 4,500 digits."""
    num_samples: int = 500
    """Samples of each model, and held-out images that they are compared with."""
    num_steps: int = 25
    """Sampling steps, DDIM, trailing."""
    guidance_scale: float = 1.0
    """Guidance of the samples; 1 is off."""


def study(config: PixelStudyConfig) -> None:
    """Runs what is missing and writes the page."""
    work, output = Path(config.work), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    demo = DemoConfig(run_dir=config.work, num_train_images=config.num_train_images)
    pack_digits(demo, "train")
    pack_digits(demo, "held_out")
    judge = load_judge(work / "judge.safetensors", config)
    images, captions, _ = digit_samples(config.num_samples, 0, "held_out")
    real = as_trained(images)
    for seed in config.seeds:
        for arm in ARMS:
            rows_file = work / "rows" / f"{arm}_{seed}.json"
            if not rows_file.is_file():
                row = measure(config, arm, seed, real, captions, judge)
                rows_file.parent.mkdir(parents=True, exist_ok=True)
                rows_file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
                print(f"* {arm}, seed {seed}: KID {row['kid']:.5f}", flush=True)
    rows = [json.loads(p.read_text("utf-8")) for p in sorted((work / "rows").glob("*.json"))]
    with (output / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_page(output, rows, json.loads((work / "judge.json").read_text("utf-8")))


def measure(
    config: PixelStudyConfig,
    arm: str,
    seed: int,
    real: Tensor,
    captions: list[str],
    judge: DigitJudge,
) -> dict[str, Any]:
    """Trains one model, samples it and returns its row."""
    work = Path(config.work)
    run_dir = work / "runs" / f"{arm}_{seed}"
    started_s = time.perf_counter()
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
    trained_s = time.perf_counter()
    model = DiffusionModel.load(run_dir)
    samples = model.sample(
        captions,
        seeds=list(range(len(captions))),
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=0.0,
        batch_size=50,
    )
    sampled_s = time.perf_counter()
    digits = torch.tensor([digit_of(caption) for caption in captions])
    read = DigitReader.load(DIGIT_READER).read(samples)
    pictures = [to_picture(image) for image in samples[:NUM_PICTURED]]
    caption_grid([arm], [pictures], captions[:NUM_PICTURED]).save(
        Path(config.output) / f"samples_{arm}_{seed}.png"
    )
    return {
        "arm": arm,
        "seed": seed,
        "kid": kid(judge, real, (255 * samples).round().to(torch.uint8)),
        "digits_read": (read == digits).double().mean().item(),
        "num_samples": len(captions),
        "max_steps": config.max_steps,
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
        "training_s": round(trained_s - started_s, 1),
        "sampling_s": round(sampled_s - trained_s, 1),
    }


@torch.inference_mode()
def kid(judge: DigitJudge, real: Tensor, fake: Tensor) -> float:
    """Returns the unbiased KID of all images: one subset, as large as the sets."""
    metric = KernelInceptionDistance(feature=judge, subsets=1, subset_size=len(fake))
    for images, is_real in ((real, True), (fake, False)):
        for chunk in images.split(250):
            metric.update(chunk, real=is_real)
    mean, _ = metric.compute()
    return float(mean)


def load_judge(path: Path, config: PixelStudyConfig) -> DigitJudge:
    """Loads the classifier, or trains it on the images that the models are trained on."""
    judge = DigitJudge()
    if path.is_file():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    samples = digit_samples(config.num_train_images, 0, "train")
    judge = train_digit_judge(as_trained(samples[0]), labels_of(*samples))
    held_out = digit_samples(2000, 1, "held_out")
    shares = judge.accuracy(as_trained(held_out[0]), labels_of(*held_out))
    accuracy = dict(zip(("digit", "ink", "background"), shares, strict=True))
    path.with_suffix(".json").write_text(json.dumps(accuracy, indent=1) + "\n", encoding="utf-8")
    save_file(judge.state_dict(), path)
    return judge


def as_trained(images: np.ndarray) -> Tensor:
    """Resizes images (N, 64, 64, 3) as the models see them; returns uint8 (N, 3, 32, 32)."""
    size = (SIDE_PX, SIDE_PX)
    small = [transform(Image.fromarray(image), size, 0.5, 0.5, flip=False) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def main(argv: list[str]) -> int:
    """Runs the study; returns the exit status, 2 for wrong input."""
    try:
        study(load(PixelStudyConfig, argv))
    except UserError as error:
        print(f"pixel_study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
