"""`make bench`: what blackpoint adds to a bare loop over the same model, measured side by side.

Training: a run of `train` is stopped every few steps for as many steps of a bare loop with its own
copy of the weights, and the pairs are compared, so that a machine whose speed drifts slows both.
The bare loop encodes, adds noise, predicts, steps back, clips and steps AdamW, on images that lie
decoded in memory; ours also reads shards, draws for each sample by itself, averages the weights and
logs. Sampling: `DiffusionModel.sample` (prompts, loop, decode) against the UNet calls alone.

Writes docs/benchmarks.json and docs/benchmarks.md.
"""

import copy
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F

from data.module import CaptionedImages
from sampling.guidance import Guidance
from sampling.model import DiffusionModel
from sampling.noise import initial_noise
from sampling.prediction import add_noise, training_target
from sampling.samplers import SampleState, SamplingGrid, run
from scripts.config import load
from train.config import TrainConfig
from train.module import FineTuner
from train.process import fine_tuned_process
from train.run import build_callbacks, build_trainer
from train.run_directory import describe_environment


@dataclass
class BenchConfig:
    """What is timed."""

    config: str = "configs/tiny_zero_snr.yaml"
    """The fine-tune whose model, data and batch size are timed."""
    blocks: int = 12
    """Pairs of training blocks."""
    warmup_blocks: int = 8
    """Pairs that run first and are not counted, while the run encodes its captions and keeps them
    (it encodes each caption once; the bare loop encodes every batch)."""
    block_steps: int = 5
    """Optimizer steps a block."""
    sample_repeats: int = 5
    """Pairs of sampling runs, after one that is not counted."""
    sample_images: int = 16
    """Images a sampling run."""
    num_steps: int = 25
    """Sampling steps, with guidance 7.5."""
    output: str = "docs"
    """Folder of benchmarks.json and benchmarks.md."""


class PairedBlocks(Callback):
    """Times blocks of the run and of the bare loop in turn."""

    def __init__(self, bare_steps: Callable[[int], None], block_steps: int) -> None:
        self.bare_steps, self.block_steps = bare_steps, block_steps
        self.pairs: list[tuple[float, float]] = []  # seconds of ours, of the bare loop
        self._started_s: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.block_steps:
            return
        now = time.perf_counter()
        ours = None if self._started_s is None else now - self._started_s
        self.bare_steps(self.block_steps)
        if ours is not None:
            self.pairs.append((ours, time.perf_counter() - now))
        self._started_s = time.perf_counter()


def bare_training(model: DiffusionModel, config: TrainConfig) -> Callable[[int], None]:
    """Returns a function that takes optimizer steps with a copy of the UNet."""
    unet = copy.deepcopy(model.unet).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    images.setup("fit")
    batches = iter(images.train_dataloader())
    held = [next(batches) for _ in range(4)]
    schedule, kind = model.process.schedule, model.process.prediction_type

    def steps(count: int) -> None:
        for number in range(count):
            batch = held[number % len(held)]
            shape = (config.batch_size, *model.latent_shape(*batch["image"].shape[-2:]))
            x0 = model.encode(batch["image"].float() / 255, torch.randn(shape))
            embeds = model.encode_prompts(batch["caption"]).prompt_embeds
            t, eps = torch.randint(schedule.num_steps, (len(x0),)), torch.randn(shape)
            alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.at(t))
            output = unet(add_noise(x0, eps, alpha, sigma), t, embeds).sample
            loss = F.mse_loss(output, training_target(kind, x0, eps, alpha, sigma))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()

    return steps


def bench_training(settings: BenchConfig, run_dir: Path) -> list[tuple[float, float]]:
    """Returns (seconds of ours, seconds of the bare loop) a block."""
    max_steps = (settings.warmup_blocks + settings.blocks + 1) * settings.block_steps
    overrides = [
        f"run_dir={run_dir}",
        f"trainer.max_steps={max_steps}",
        "trainer.validate_every_steps=0",
        f"trainer.checkpoint_every_steps={max_steps}",
        "preview.every_steps=0",
        "wandb.enabled=false",
    ]
    config = load(TrainConfig, [settings.config, *overrides])
    model = DiffusionModel.load(config.checkpoint)
    model.process = fine_tuned_process(config, model.process)
    pairs = PairedBlocks(bare_training(model, config), settings.block_steps)
    _, callbacks = build_callbacks(config, run_dir)
    trainer = build_trainer(config, run_dir, [], [*callbacks, pairs])
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    trainer.fit(FineTuner(model, config), datamodule=images)
    return pairs.pairs[settings.warmup_blocks :]


@torch.no_grad()
def bench_sampling(settings: BenchConfig, checkpoint: str) -> dict[str, list[float]]:
    """Returns the seconds of each repeat: UNet calls alone, sampler loop, whole `sample`."""
    model = DiffusionModel.load(checkpoint)
    shape, count = model.latent_shape(), settings.sample_images
    seeds = list(range(count))
    noise = initial_noise(seeds, shape)
    timesteps = model.process.timesteps(settings.num_steps)
    grid = SamplingGrid.of(model.process.schedule, timesteps)
    conditional = model.encode_prompts(["a red three on a black background"] * count)
    empty = model.encode_prompts([""] * count)
    both = torch.cat([empty.prompt_embeds, conditional.prompt_embeds])
    doubled = torch.cat([noise, noise])
    denoise = model.denoiser(conditional, empty, Guidance(7.5, 0.7))

    def unet_calls() -> None:
        for t in timesteps:
            model.unet(doubled, torch.full((2 * count,), t), both, return_dict=False)

    def loop() -> None:
        run("ddim", denoise, grid, SampleState(noise))

    def whole() -> None:
        model.sample(
            ["a red three on a black background"] * count,
            seeds,
            num_steps=settings.num_steps,
            batch_size=count,
        )

    parts = {"unet_calls": unet_calls, "loop": loop, "sample": whole}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(settings.sample_repeats + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Returns median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def bench(settings: BenchConfig) -> dict[str, Any]:
    """Runs both and returns ratios with their raw seconds."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = bench_training(settings, Path(folder))
    config = load(TrainConfig, [settings.config])
    seconds = bench_sampling(settings, config.checkpoint)
    bare = seconds["unet_calls"]
    images = settings.block_steps * config.batch_size
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.__version__}",
        "environment": describe_environment(),
        "training_over_bare": spread([bare_s / ours for ours, bare_s in pairs]),
        "training_images_per_s": spread([images / ours for ours, _ in pairs]),
        "bare_images_per_s": spread([images / bare_s for _, bare_s in pairs]),
        "loop_over_unet_calls": spread(
            [ours / alone for ours, alone in zip(seconds["loop"], bare, strict=True)]
        ),
        "sample_over_unet_calls": spread(
            [ours / alone for ours, alone in zip(seconds["sample"], bare, strict=True)]
        ),
        "raw": {"training_pairs_s": pairs, "sampling_s": seconds},
    }


ROWS = {
    "training_images_per_s": "training, images/s",
    "bare_images_per_s": "bare training loop, images/s",
    "training_over_bare": "training / bare loop (images/s; higher is better, wanted >= .95)",
    "loop_over_unet_calls": "guided sampler loop / UNet calls alone (seconds; wanted <= 1.03)",
    "sample_over_unet_calls": "sample(), with prompts and decode / UNet calls alone (seconds)",
}


def table(result: dict[str, Any]) -> str:
    """Writes the Markdown table."""
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` on {result['date']}: {result['machine']}.",
        "Pairs measured in turn in one run; raw seconds in benchmarks.json.",
        "",
        "| what | median | min | max |",
        "|---|---|---|---|",
    ]
    for key, text in ROWS.items():
        row = result[key]
        lines.append(f"| {text} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Measures, prints the table and writes both files."""
    settings = load(BenchConfig, argv)
    result = bench(settings)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
