"""`make bench`: blackpoint side by side with a bare loop and with the tools people use.

Training (encoders in the loop, cached latents), sampling, start-up and peak memory, on the CPU and
the embedded model. Contestants take turns within one run and are compared round by round, so that a
machine whose speed drifts slows all alike. Writes benchmarks.json (with every raw second) and
benchmarks.md.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts import bench_inputs as inputs
from scripts import bench_memory as memory
from scripts import bench_reader as reader
from scripts import bench_sampling as sampling
from scripts import bench_startup as startup
from scripts import bench_training as training
from scripts.bench_timing import Row
from scripts.cli import VERBS
from scripts.config import load
from train.run_directory import describe_environment

READER_BATCHES = 50
PEERS = ("accelerate", "diffusers", "torch", "lightning", "transformers", "torchvision")


@dataclass
class BenchConfig:
    """What is timed; the defaults take about twenty minutes on two idle cores."""

    config: str = "configs/tiny_zero_snr.yaml"
    """The fine-tune whose model, data and batch size are timed."""
    rounds: int = 12
    """Rounds of training: a block of each contestant."""
    block_steps: int = 5
    """Optimizer steps a block."""
    warmup_steps: int = 40
    """Steps of ours before the first round, in which it keeps the embeddings of captions it has
    seen; it encodes each once, the others encode every batch."""
    sample_rounds: int = 12
    """Rounds of sampling."""
    sample_images: int = 8
    """Images a sampling run."""
    num_steps: int = 25
    """Sampling steps, with guidance 7.5."""
    reader_rounds: int = 12
    """Rounds of the reader, of 50 batches each."""
    run_rounds: int = 3
    """Rounds of the runs of train: on images, on the cache, of two processes."""
    run_steps: int = 60
    """Optimizer steps of such a run; the second half is timed."""
    startup_rounds: int = 5
    """Rounds of start-up."""
    memory_rounds: int = 2
    """Rounds of peak memory."""
    memory_steps: int = 8
    """Optimizer or sampling steps after which the peak memory is read."""
    quick: bool = False
    """The smallest of everything, to see that it runs; the numbers mean nothing."""
    output: str = "docs"
    """Folder of benchmarks.json and benchmarks.md."""


PROFILE = """\
What was in the way (cProfile of 39 steps, 2026-11-22, the same machine and config): with the
encoders in the loop a step of 594 ms is backward 48 %, UNet 31 %, VAE 10 %, AdamW 3 %, clipping 2
%; what a bare loop has not is reading 2.2 %, the average 1.0 %, the caption look-up .5 %, the
draws .4 % and the metrics .1 %. From cached latents (503 ms) reading takes 1.1 %. In the code
because of profiles: a caption is encoded once; the gradients' norm is computed once, without a
walk over the modules; the average is one fused operation; weights lie channels last (26.9 and 36.5
images/s, where contiguous ones gave 23.4 and 25.6 in turn)."""

QUICK: dict[str, Any] = {
    "rounds": 2,
    "block_steps": 1,
    "warmup_steps": 1,
    "sample_rounds": 2,
    "sample_images": 2,
    "num_steps": 2,
    "reader_rounds": 2,
    "run_rounds": 1,
    "run_steps": 4,
    "startup_rounds": 1,
    "memory_rounds": 1,
    "memory_steps": 2,
}


def bench(settings: BenchConfig) -> dict[str, Any]:
    """Measures everything and returns rows, raw numbers, machine and versions."""
    raw: dict[str, Any] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = inputs.training_config(settings.config, folder / "unused", 1)
        prepared = inputs.prepare(config, folder)
        for group, cached, keeps_captions in (
            ("training, encoders in the loop", False, True),
            ("training, encoders in the loop, no caption met before", False, False),
            ("training, cached latents", True, True),
        ):
            say(group)
            raw[group] = training.time_training(
                settings.config,
                prepared,
                folder,
                cached,
                settings.warmup_steps,
                settings.block_steps,
                settings.rounds,
                keeps_captions,
            )
            images = settings.block_steps * config.batch_size
            rows += training.training_rows(group, raw[group], images)
        say("sampling")
        raw["sampling"] = sampling.time_sampling(
            config, settings.sample_images, settings.num_steps, settings.sample_rounds
        )
        rows += sampling.sampling_rows(raw["sampling"], settings.sample_images)
        say("reader")
        raw["reader"] = reader.time_reader(config, READER_BATCHES, settings.reader_rounds)
        rows += reader.reader_rows(raw["reader"], READER_BATCHES * config.batch_size)
        say("cache and processes")
        raw["runs"] = reader.time_runs(
            settings.config, prepared, folder, settings.run_steps, settings.run_rounds
        )
        rows += reader.run_rows(raw["runs"])
        say("peak memory")
        raw["memory"] = memory.measure_memory(
            settings.config,
            prepared,
            folder,
            settings.memory_steps,
            settings.sample_images,
            settings.memory_rounds,
        )
        rows += memory.memory_rows(raw["memory"])
    say("start-up")
    verbs = ["data pack"] if settings.quick else list(VERBS)
    raw["startup"] = startup.time_startup(verbs, settings.startup_rounds)
    rows += startup.startup_rows(raw["startup"])
    return {**describe(settings), "rows": [_as_json(row) for row in rows], "raw": raw}


def describe(settings: BenchConfig) -> dict[str, Any]:
    """Returns when, where and with which versions it was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {_memory_gb():.0f} GB",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PEERS},
        "settings": dataclasses.asdict(settings),
        "environment": describe_environment(),
    }


def table(result: dict[str, Any]) -> str:
    """Writes the Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = BenchConfig(**result["settings"])
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` on {result['date']}: {result['machine']}; {versions}.",
        "",
        f"The model, data and batch size of {settings.config}, float32, on the CPU. The contestants"
        " take turns within one run; ratios are taken round by round. Spread is the lowest and the"
        " highest round, the interval (95 %, bootstrap) is of the ratios' geometric mean over n"
        " rounds. Raw seconds: benchmarks.json.",
        "",
        f"Training: blocks of {settings.block_steps} optimizer steps. Ours is `blackpoint train`"
        " with its EMA, checks and metrics; it keeps the embeddings of captions, which the digits"
        " repeat; where it meets none twice it encodes them one by one on a CPU, for the sake of a"
        " resume that repeats every bit. The bare loop has its batches decoded in memory, keeps no"
        " average and logs nothing. The accelerate loop has the"
        " structure of diffusers' public text-to-image example, over a folder of files. No"
        " contestant has loader processes.",
        f"Sampling: {settings.sample_images} images in a batch, {settings.num_steps} DDIM steps,"
        " guidance 7.5 with rescale .7.",
    ]
    lines += ["", PROFILE]
    for group, rows in itertools.groupby(result["rows"], key=lambda row: row["group"]):
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += ["| what | median | spread | interval | n | wanted |", "|---|---|---|---|---|---|"]
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    def number(value: float) -> str:
        return f"{value:.0f}" if row["unit"] == "MB" else f"{value:.3f}"

    interval = " to ".join(map(number, row["interval"])) if row["interval"] else ""
    unit = f" {row['unit']}" if row["unit"] else ""
    verdict = {None: "", True: "met", False: "NOT MET"}[row["met"]]
    cells = [
        row["what"],
        f"{number(row['median'])}{unit}",
        f"{number(row['lowest'])} to {number(row['highest'])}",
        interval,
        str(row["n"]),
        f"{row['wanted']} {verdict}".strip(),
    ]
    return f"| {' | '.join(cells)} |"


def _as_json(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"wanted": row.wanted, "met": row.met}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def say(text: str) -> None:
    """Tells on stderr what is being measured."""
    print(f"* {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes both files."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # timed on the CPU alone, wherever it runs
    settings = load(BenchConfig, argv)
    if settings.quick:
        settings = dataclasses.replace(settings, **QUICK)
    result = bench(settings)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
