"""`make bench`: blackpoint side by side with a bare loop and with the tools people use.

Training (encoders in the loop, cached latents), sampling, start-up and peak memory, on the CPU and
the embedded model. Contestants take turns within one run and are compared round by round, so that a
machine whose speed drifts slows all alike. Writes benchmarks.json (with every raw second) and
benchmarks.md.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report.page import Page, Section
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.bench import inputs, memory, reader, sampling, search, startup, training
from blackpoint.scripts.bench.timing import Row
from blackpoint.scripts.cli import VERBS
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.environment import describe_environment

READER_BATCHES, PIPELINE_STEPS = 50, 5
PEERS = ("accelerate", "diffusers", "torch", "lightning", "transformers", "torchvision")


@dataclass
class BenchConfig:
    """What is timed; the defaults take about half an hour on two idle cores."""

    config: str = "configs/tiny_zero_snr.yaml"
    """The fine-tune whose model, data and batch size are timed."""
    rounds: int = 12
    """Rounds of training: a block of each contestant."""
    block_steps: int = 5
    """Optimizer steps per block."""
    warmup_steps: int = 40
    """Steps of ours before the first round, in which it keeps the embeddings of captions it has
    seen; it encodes each once, the others encode every batch."""
    sample_rounds: int = 16
    """Rounds of sampling."""
    sample_images: int = 8
    """Images per sampling run."""
    num_steps: int = 25
    """Sampling steps, with guidance 7.5."""
    search_rounds: int = 6
    """Rounds of search, and of the pipelines of diffusers."""
    search_candidates: int = 16
    """Candidates of each of two prompts, all of one prompt at once."""
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
    parts: list[str] = field(default_factory=list)
    """Measure only these (training, captions, cached, sampling, search, pipelines, reader, runs,
    memory, startup) and keep what output/benchmarks.json has of the others; empty: all."""
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
    "search_rounds": 1,
    "search_candidates": 2,
    "num_steps": 2,
    "reader_rounds": 2,
    "run_rounds": 1,
    "run_steps": 4,
    "startup_rounds": 1,
    "memory_rounds": 1,
    "memory_steps": 2,
}


def bench(settings: BenchConfig) -> dict[str, Any]:
    """Measures the parts that are asked for; returns all, with date, machine and versions."""
    kept = _measured_before(Path(settings.output) / "benchmarks.json") if settings.parts else {}
    wanted = settings.parts or list(PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise UserError(f"parts={unknown}: is none of {', '.join(PARTS)}")
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = inputs.training_config(settings.config, folder / "unused", 1)
        context = Context(settings, config, folder)
        for part, measure in PARTS.items():
            if part in wanted:
                say(part)
                raw, rows = measure(context)
                measured[part] = {
                    **describe(settings),
                    "rows": list(map(_as_json, rows)),
                    "raw": raw,
                }
            elif part in kept:
                measured[part] = kept[part]
    return {"parts": measured}


@dataclass(frozen=True)
class Context:
    """Settings, config and folder that the parts share."""

    settings: BenchConfig
    config: TrainConfig
    folder: Path

    @functools.cached_property
    def prepared(self) -> inputs.Inputs:
        """Packed and encoded once, by the first part that needs it."""
        return inputs.prepare(self.config, self.folder)


Measured = tuple[Any, list[Row]]  # raw numbers, and the rows made of them


def _training(context: Context, group: str, cached: bool, keeps_captions: bool) -> Measured:
    settings = context.settings
    seconds = training.time_training(
        settings.config,
        context.prepared,
        context.folder,
        cached,
        settings.warmup_steps,
        settings.block_steps,
        settings.rounds,
        keeps_captions,
    )
    images = settings.block_steps * context.config.batch_size
    return seconds, training.training_rows(group, seconds, images, is_bound=keeps_captions)


def _sampling(context: Context) -> Measured:
    settings = context.settings
    seconds = sampling.time_sampling(
        context.config, settings.sample_images, settings.num_steps, settings.sample_rounds
    )
    return seconds, sampling.sampling_rows(seconds, settings.sample_images)


def _search(context: Context) -> Measured:
    settings = context.settings
    about = settings.search_candidates, settings.num_steps, settings.search_rounds
    seconds = search.time_search(context.config, context.folder, *about)
    return seconds, search.search_rows(seconds, settings.search_candidates)


def _pipelines(context: Context) -> Measured:
    num_steps = min(context.settings.num_steps, PIPELINE_STEPS)
    seconds = sampling.time_pipelines(num_steps, context.settings.search_rounds)
    return seconds, sampling.pipeline_rows(seconds, num_steps)


def _reader(context: Context) -> Measured:
    seconds = reader.time_reader(context.config, READER_BATCHES, context.settings.reader_rounds)
    return seconds, reader.reader_rows(seconds, READER_BATCHES * context.config.batch_size)


def _runs(context: Context) -> Measured:
    settings = context.settings
    runs = reader.time_runs(
        settings.config, context.prepared, context.folder, settings.run_steps, settings.run_rounds
    )
    return runs, reader.run_rows(runs)


def _memory(context: Context) -> Measured:
    settings = context.settings
    peaks = memory.measure_memory(
        settings.config,
        context.prepared,
        context.folder,
        settings.memory_steps,
        settings.sample_images,
        settings.memory_rounds,
    )
    return peaks, memory.memory_rows(peaks)


def _startup(context: Context) -> Measured:
    verbs = ["data pack"] if context.settings.quick else list(VERBS)
    seconds = startup.time_startup(verbs, context.settings.startup_rounds)
    return seconds, startup.startup_rows(seconds)


IN_THE_LOOP = "training, encoders in the loop"
PARTS: dict[str, Callable[[Context], Measured]] = {
    "training": lambda context: _training(context, IN_THE_LOOP, False, True),
    "captions": lambda context: _training(
        context, f"{IN_THE_LOOP}, no caption met before", False, False
    ),
    "cached": lambda context: _training(context, "training, cached latents", True, True),
    "sampling": _sampling,
    "search": _search,
    "pipelines": _pipelines,
    "reader": _reader,
    "runs": _runs,
    "memory": _memory,
    "startup": _startup,
}


def _measured_before(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}


def describe(settings: BenchConfig) -> dict[str, Any]:
    """Returns when, where and with which versions it was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine()['machine']}, {torch.get_num_threads()} threads of torch",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PEERS},
        "settings": dataclasses.asdict(settings),
        "environment": describe_environment(),
    }


def table(result: dict[str, Any]) -> str:
    """Writes the Markdown page."""
    by_run: dict[str, list[str]] = {}
    for name, part in result["parts"].items():
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        run = f"`make bench` on {part['date']}: {part['machine']}; {versions}."
        by_run.setdefault(run, []).append(name)
    runs = [
        run + (f" Parts: {', '.join(names)}." if len(by_run) > 1 else "")
        for run, names in by_run.items()
    ]
    settings = BenchConfig(**next(iter(result["parts"].values()))["settings"])
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    return Page(
        "Benchmarks",
        [
            *runs,
            f"The model, data and batch size of {settings.config}, float32, on the CPU. The"
            " contestants take turns within one run; ratios are taken round by round. Spread is the"
            " lowest and the highest round, the interval (95 %, bootstrap) is of the ratios'"
            " geometric mean over n rounds. Raw seconds and settings: benchmarks.json.",
            "Training: blocks of optimizer steps. Ours is `blackpoint train`"
            " with its EMA, checks and metrics; it keeps the embeddings of captions, which the"
            " digits repeat; where it meets none twice it encodes them one by one on a CPU, for the"
            " sake of a resume that repeats every bit. The bare loop has its batches decoded in"
            " memory, keeps no average and logs nothing. The accelerate loop has the"
            " structure of diffusers' public text-to-image example, over a folder of files. No"
            " contestant has loader processes.\n"
            f"Sampling: {settings.num_steps} DDIM steps of one batch, guidance 7.5 with rescale .7."
            f" Search: the best of {settings.search_candidates} of each of two prompts, so"
            " sampled.",
            PROFILE,
            *(
                Section(f"{group[0].upper()}{group[1:]}", [Table([*map(_line, members)])])
                for group, members in itertools.groupby(rows, key=lambda row: row["group"])
            ),
        ],
    ).markdown()


def _line(row: dict[str, Any]) -> dict[str, Any]:
    def number(value: float) -> str:
        return f"{value:.0f}" if row["unit"] == "MB" else f"{value:.3f}"

    verdict = {None: "", True: "met", False: "NOT MET"}[row["met"]]
    return {
        "what": row["what"],
        "median": f"{number(row['median'])} {row['unit']}".strip(),
        "spread": f"{number(row['lowest'])} to {number(row['highest'])}",
        "interval": " to ".join(map(number, row["interval"])) if row["interval"] else "",
        "n": row["n"],
        "wanted": f"{row['wanted']} {verdict}".strip(),
    }


def _as_json(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"wanted": row.wanted, "met": row.met}


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
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
