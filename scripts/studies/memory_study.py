"""Do options that save memory train as float32 does? python -m
blackpoint.scripts.studies.memory_study

The demo's fine-tune (configs/tiny_zero_snr.yaml) from cached latents, for its steps, by each
option: the validation loss of the averaged weights at the end. At one seed all see the same
batches, t and eps, so a difference to float32 of that seed is the option's; the spread of float32
over seeds is the scale to see it at. The same command goes on where it stopped; the page is
written anew after every training. Without bitsandbytes the row of 8-bit states is left out.
"""

import importlib.util
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digits import Split, packed_digits
from blackpoint.scripts.stand_alone import describe_machine, run_script, write_page
from blackpoint.scripts.studies.study import blackpoint
from blackpoint.train.records.metrics_file import read_metrics

YAML, RUN_DIR, BASE = "configs/tiny_zero_snr.yaml", Path("runs/memory_study"), "assets/tiny_sd"
FLOAT32 = "float32"
BFLOAT16 = "trainer.precision=bf16-true"
FUSED = ("optimizer.fused_backward=true", "trainer.gradient_clip=0")
ARMS: dict[str, tuple[str, ...]] = {
    FLOAT32: (),
    "bf16-true": (BFLOAT16,),
    "bf16-true, rounded to nearest": (BFLOAT16, "optimizer.rounding=nearest"),
    "Adafactor": ("optimizer.name=adafactor",),
    "Adafactor, bf16-true, fused, average every 10 steps": (
        "optimizer.name=adafactor", BFLOAT16, *FUSED, "ema.every_steps=10", "ema.device=cpu"
    ),
    "8-bit AdamW": ("optimizer.name=adamw_8bit", "trainer.channels_last=false"),
}  # fmt: skip
"""Name -> keys of `blackpoint train`."""
COUNTS: dict[Split, int] = {"train": 9000, "held_out": 2000}


@dataclass
class MemoryStudyConfig:
    """How much is trained, and where the page goes."""

    num_seeds: int = 3
    """Seeds of float32 and of bf16-true in both roundings; the others are trained with the first
    alone."""
    validation_images: int = 512
    """Held-out images of the validation loss."""
    output: str = "docs/memory_study"
    """Page (.md) and numbers (.json) to write."""


def study(config: MemoryStudyConfig) -> None:
    """Trains what is missing, one after another, and writes the page after each."""
    shards = {split: latents(split, count) for split, count in COUNTS.items()}
    losses: dict[str, list[float]] = {}
    for seed in range(config.num_seeds):
        for arm, options in ARMS.items():
            is_missing = "8-bit" in arm and importlib.util.find_spec("bitsandbytes") is None
            if is_missing or (seed and not arm.startswith((FLOAT32, "bf16-true"))):
                continue
            run_dir = RUN_DIR / f"{''.join(c if c.isalnum() else '_' for c in arm)}_{seed}"
            shared = {
                "run_dir": run_dir,
                "seed": seed,
                "data.shards": shards["train"],
                "data.validation_shards": shards["held_out"],
                "data.validation_images": config.validation_images,
                "preview.every_steps": 0,
                "wandb.enabled": "false",
            }
            if not (run_dir / "export").exists():
                blackpoint("train", YAML, *(f"{k}={v}" for k, v in shared.items()), *options)
            loss = read_metrics(run_dir / "metrics.csv")["validation/loss"][-1][1]
            losses.setdefault(arm, []).append(loss)
            write_page(config.output, page(losses), describe_machine() | {"losses": losses})


def latents(split: Split, count: int) -> Path:
    """Packs digits and encodes them, as far as it is not done; returns the shards of latents."""
    source, output = packed_digits(RUN_DIR, split, count), RUN_DIR / "latents" / split
    if not output.exists():
        arguments = [f"source={source}", f"checkpoint={BASE}", f"output={output}", "resolution=64"]
        blackpoint("data", "encode", *arguments, "dtype=float32", "batch_size=64", "num_workers=0")
    return output


def page(losses: dict[str, list[float]]) -> str:
    """Returns the table as Markdown: losses by seed, and the change from float32 of each seed."""
    rows = []
    for arm, values in losses.items():
        changes = [loss - other for loss, other in zip(values, losses[FLOAT32], strict=False)]
        row: dict[str, Any] = {"trained": arm, "keys": " ".join(f"`{key}`" for key in ARMS[arm])}
        row |= {f"seed {seed}": loss for seed, loss in enumerate(values)}
        mean = None if arm == FLOAT32 else statistics.fmean(changes)
        rows.append(row | {"minus float32, mean": mean})
    of_float32 = losses[FLOAT32]
    spread = (
        f" Between seeds of float32 it differs by {max(of_float32) - min(of_float32):.4f}."
        if len(of_float32) > 1
        else ""
    )
    columns = {"trained": "", "keys": ""} | {f"seed {n}": ".4f" for n in range(len(of_float32))}
    columns["minus float32, mean"] = "+.4f"
    note = f"Validation loss of the averaged weights after the demo's steps.{spread}"
    table = Table(rows, columns).markdown()
    return f"# Options that save memory, beside float32\n\n{note}\n\n{table}"


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("memory_study", lambda: study(load(MemoryStudyConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
