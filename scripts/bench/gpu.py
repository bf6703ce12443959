"""`python -m blackpoint.scripts.bench.gpu [only=ROW]`: training and sampling at full size on a GPU.

It takes at most four minutes on one card, without network, and writes gpu.json and gpu.md. Each
result is a line of JSON as soon as it is there; `only=ROW` measures one row again and keeps the
others of the file. `device=cpu` runs the same rows on models a tenth as wide, to see that they run.

It needs torch 2.11 or newer, transformers, and wheels that can be brought along, all of pure Python
but for psutil; of requirements of diffusers add what the machine lacks:

    pip install --no-deps --target brought diffusers importlib-metadata zipp requests omegaconf \\
        jaxtyping wadler-lindig docstring-parser braceexpand accelerate psutil
    ln -s "$PWD" brought/blackpoint && PYTHONPATH=brought python -m blackpoint.scripts.bench.gpu

With lightning, lightning-utilities and torchmetrics among them trainings of ours are measured
beside the bare loop, with peft those of adapters, with xformers its attention; a row says what it
lacks.
"""

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.runtime.memory import GB, peak_bytes
from blackpoint.sampling.runtime.precision import computes_in_bfloat16, set_tf32
from blackpoint.scripts.bench import gpu_rows as rows
from blackpoint.scripts.bench.gpu_models import FULL_SIZE, SMALL_FORM, Family
from blackpoint.scripts.bench.timing import Seconds, time_round
from blackpoint.scripts.config import load
from blackpoint.scripts.out_of_memory import is_out_of_memory
from blackpoint.scripts.stand_alone import run_script

PACKAGES = ("torch", "diffusers", "transformers", "lightning", "peft", "xformers", "triton")


class RowOf(NamedTuple):
    """What measures a row, and the time that it must have left to be begun."""

    measure: Callable[["Bench"], None]
    needs_s: float = 20.0


def _training(*given: Any) -> RowOf:
    return RowOf(lambda bench: rows.training(bench, *given))


ROWS: dict[str, RowOf] = {
    "sd15_full": _training("sd15", "full", "bf16-mixed"),
    "sdxl_full": _training("sdxl", "full", "bf16-mixed"),
    "sd15_lora": _training("sd15", "lora", "bf16-mixed"),
    "sdxl_lora": _training("sdxl", "lora", "bf16-mixed"),
    "sd15_sampling": RowOf(lambda bench: rows.sampling(bench, "sd15")),
    "sdxl_sampling": RowOf(lambda bench: rows.sampling(bench, "sdxl")),
    "search": RowOf(lambda bench: rows.search(bench, "sd15")),
    "attention": RowOf(lambda bench: rows.attention(bench, "sd15")),
    "fp16": _training("sd15", "full", "16-mixed"),
    "bf16_true": _training("sd15", "full", "bf16-true"),
    "float32": _training("sd15", "full", "32-true"),
    "compile": RowOf(lambda bench: rows.compilation(bench, "sd15", "forward"), 60.0),
    "compile_training": RowOf(lambda bench: rows.compilation(bench, "sd15", "full"), 90.0),
}
COLUMNS = {
    "row": "",
    "what": "",
    "ms": ".1f",
    "images_per_s": ".2f",
    "tflop": ".2f",
    "share_of_peak": ".2f",
    "flop_floor_ms": ".1f",
    "byte_floor_ms": ".1f",
    "peak_gb": ".1f",
    "of_base": ".3f",
    "note": "",
}
READING = """\
ms: median of the rounds, of a training step, of a sampled batch, of a batch of candidates or of one
call of the UNet. tflop: of the UNet alone. share_of_peak: of the products of matrices measured
here, in the number format of the row. The floors: tflop at that speed, and the bytes that must move
(weights, or the optimizer's) at the measured bandwidth. of_base: the first contestant's time over
this one's; in search, that of as many candidates one by one. peak_gb: of the row until then; of a
training, that of the contestant alone."""


@dataclass
class GpuBenchConfig:
    """What is measured, and where it goes."""

    only: str | None = None
    """The one row to measure; not set: all of them."""
    device: str = "cuda"
    """cuda: the published architectures; cpu: models a tenth as wide."""
    output: str = "gpu"
    """Path of the page and its data, without .md and .json."""
    limit_s: float = 230.0
    """Rows that would not end within this are left out, and say so."""
    rounds: int = 3
    """Rounds of each contestant."""
    steps: int = 2
    """Training steps in a round."""
    num_steps: int = 10
    """Sampling steps."""


@dataclass
class Bench:
    """The device, how fast it was measured to be, and the results so far."""

    device: torch.device
    config: GpuBenchConfig
    flops_per_s: dict[torch.dtype, float] = field(default_factory=dict)
    bytes_per_s: float = 0.0
    row: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def families(self) -> Mapping[str, Family]:
        """The models by name."""
        return FULL_SIZE if self.device.type == "cuda" else SMALL_FORM

    @property
    def half(self) -> torch.dtype:
        """The number format that sampling takes on the device."""
        is_able = self.device.type == "cuda" and computes_in_bfloat16(self.device)
        return torch.bfloat16 if is_able else torch.float32

    def emit(self, result: dict[str, Any]) -> None:
        """Keeps a result of the row, and prints it."""
        self.results.append({"row": self.row, **result})
        print(json.dumps(self.results[-1]), flush=True)

    def measure(self, function: Callable[["Bench"], None]) -> None:
        """Measures the row; what fails is its note: the other rows are wanted all the same."""
        self.clear()
        try:
            function(self)
        except Exception as error:
            reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}"
            lines = str(error).splitlines()
            self.emit({"note": f"failed: {reason}: {lines[0] if lines else ''}"})

    def wait(self) -> None:
        """Returns when the work given so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Frees what the contestant before has left, and forgets its peak of memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, parts: Mapping[str, Callable[[], object]], warm_ups: int = 1) -> Seconds:
        """Times contestants in turn, until the device is done, after calls that are not timed."""

        def whole(part: Callable[[], object]) -> None:
            part()
            self.wait()

        waiting = {name: functools.partial(whole, part) for name, part in parts.items()}
        found: Seconds = {}
        for _ in range(warm_ups):
            time_round(waiting, 0, {})
        for number in range(self.config.rounds):
            time_round(waiting, number, found)
        return found

    def result(
        self,
        what: str,
        seconds: Sequence[float],
        images: int,
        flops: float = 0.0,
        num_bytes: float = 0.0,
        dtype: torch.dtype = torch.float32,
        base: Sequence[float] = (),
        note: str = "",
    ) -> None:
        """Hands on a contestant's seconds per step, one per round, beside its floors.

        `base` are the seconds of the contestant that it is compared with.
        """
        middle = statistics.median(seconds)
        peak = self.flops_per_s[dtype]
        self.emit(
            {
                "what": what,
                "ms": 1e3 * middle,
                "lowest_ms": 1e3 * min(seconds),
                "highest_ms": 1e3 * max(seconds),
                "images_per_s": images / middle,
                "tflop": flops / 1e12,
                "share_of_peak": flops / middle / peak,
                "flop_floor_ms": 1e3 * flops / peak,
                "byte_floor_ms": 1e3 * num_bytes / self.bytes_per_s,
                "peak_gb": peak_bytes(self.device) / GB,
                "of_base": statistics.median(base) / middle if base else None,
                "note": note,
            }
        )


def measure_device(bench: Bench) -> None:
    """Measures products of matrices in each number format, and copies, in the fastest round."""
    is_gpu = bench.device.type == "cuda"
    side, size, repeats = (8192, 2**28, 10) if is_gpu else (128, 2**20, 1)

    def fastest_s(operation: Callable[[], object]) -> float:
        def calls() -> None:
            for _ in range(repeats):
                operation()

        return min(bench.seconds({"calls": calls}, warm_ups=2)["calls"]) / repeats

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if is_gpu and dtype == torch.bfloat16 and not computes_in_bfloat16(bench.device):
            continue
        a = torch.randn(side, side, device=bench.device, dtype=dtype)
        bench.flops_per_s[dtype] = 2 * side**3 / fastest_s(functools.partial(torch.mm, a, a))
    source = torch.zeros(size, device=bench.device)
    copied = torch.empty_like(source)
    copy = functools.partial(copied.copy_, source)
    bench.bytes_per_s = 2 * source.nbytes / fastest_s(copy)


def describe(bench: Bench) -> dict[str, Any]:
    """Returns when, on what and with which versions it was measured."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    card, memory = platform.machine(), 0.0
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        card, memory = properties.name, properties.total_memory / GB
    speeds = {str(k).removeprefix("torch."): v / 1e12 for k, v in bench.flops_per_s.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "card": card,
        "memory_gb": memory,
        "versions": versions,
        "tflop_per_s": speeds,
        "gb_per_s": bench.bytes_per_s / GB,
    }


def page(content: Mapping[str, Any]) -> str:
    """Writes the Markdown page."""
    speeds = ", ".join(f"{v:.3g} in {k}" for k, v in content["tflop_per_s"].items())
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    shown = [
        ["" if row.get(k) is None else format(row[k], form) for k, form in COLUMNS.items()]
        for row in content["rows"]
    ]
    heads = [list(COLUMNS), ["--:" if form else "---" for form in COLUMNS.values()]]
    lines = [f"| {' | '.join(line)} |" for line in [*heads, *shown]]
    return "\n\n".join(
        [
            "# GPU",
            f"`python -m blackpoint.scripts.bench.gpu` on {content['date']}: {content['card']}, "
            f"{content['memory_gb']:.0f} GB; {versions}.",
            f"Measured: products of matrices, TFLOP/s: {speeds}; copies: "
            f"{content['gb_per_s']:.0f} GB/s read and written.",
            READING,
            "\n".join(lines) + "\n",
        ]
    )


def run(config: GpuBenchConfig) -> None:
    """Measures the rows; keeps those of the file that are not measured again."""
    if config.only is not None and config.only not in ROWS:
        raise UserError(f"only={config.only}: is none of {', '.join(ROWS)}")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: there is no GPU (CUDA); device=cpu runs the small form")
    started_s, output = time.perf_counter(), Path(f"{config.output}.json")
    set_tf32(device.type == "cuda")
    bench = Bench(device, config)
    measure_device(bench)
    content, kept = describe(bench), []
    if config.only and output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        if before["card"] != content["card"]:
            raise UserError(
                f"output={config.output}: its rows are of {before['card']}, and this is "
                f"{content['card']}; choose another output"
            )
        kept = [row for row in before["rows"] if row["row"] != config.only]
    print(json.dumps(content), flush=True)
    for name, row in ROWS.items():
        if config.only not in (None, name):
            continue
        bench.row = name
        left_s = config.limit_s - (time.perf_counter() - started_s)
        if config.only is None and left_s < row.needs_s:
            bench.emit({"note": f"left out for want of time; only={name} measures it"})
        else:
            bench.measure(row.measure)
        order = list(ROWS)
        content["rows"] = sorted([*kept, *bench.results], key=lambda r: order.index(r["row"]))
        write_whole(output, json.dumps(content, indent=1) + "\n")
    write_whole(Path(f"{config.output}.md"), page(content))
    print(page(content))


def main(argv: Sequence[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return run_script("gpu", lambda: run(load(GpuBenchConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
