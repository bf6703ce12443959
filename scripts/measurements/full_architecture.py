"""`make full-architecture`: every verb on a full-size Stable Diffusion with random weights.

Each verb runs as a command of its own, as a user would start it, and its wall time and peak memory
stand beside the arithmetic: what its weights, gradients, moments and average must take. Training
goes from cached latents, is stopped by SIGTERM after two steps and resumed for two more.

Of SDXL adapters are trained, since its fine-tune does not fit 24 GB, and what it computes is
compared with diffusers' pipeline.

A finished verb is kept in the work folder and not run again: after a break the same command
continues. Writes OUTPUT.json (all architectures measured so far) and OUTPUT.md.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.page import Page, Section
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.measurements.full_architecture_verbs import (
    ADAPTERS,
    DIFFERENCES,
    RANK,
    Verb,
    verbs,
)
from blackpoint.scripts.measurements.measured_process import Measured, run_measured
from blackpoint.scripts.measurements.photographs import CAPTIONS, photograph
from blackpoint.scripts.stand_alone import describe_machine
from blackpoint.train.config.lora_config import LoraConfig

GB = 1e9
STOPPED_BUT_RESUMABLE = 75
OVERHEAD_BYTES = 1.5e9  # interpreter, libraries and activations
IMPORTS = "imports alone"
TITLES = {
    "sd15": "Stable Diffusion 1.5",
    "sd21_base": "Stable Diffusion 2.1 base",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "Stable Diffusion XL",
    "small": "the same blocks, a tenth as wide (a rehearsal)",
    "small_21": "the same blocks as 2.1's, a tenth as wide (a rehearsal)",
    "small_xl": "the same blocks as XL's, a tenth as wide (a rehearsal)",
}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
INTRODUCTION = """\
`make full-architecture`: folders of the published architectures with random weights go through
every verb, each a process of its own, computing in float32: training from cached latents (16x16,
batch 1, fused AdamW, gradient checkpointing, average on; of SDXL adapters alone),
sampling at 64x64 latents with guidance.

- *peak*: largest resident memory of the process, mapped files included, in GB of 10^9 bytes.
- *not droppable*: the part of it that no file backs, looked at ten times per second.
- *arithmetic*: what the verb must hold; *over* is the peak without the imports, divided by it.
  A second copy of the weights would add .2 to a fine-tune and .6 to 1 to the other verbs.
- *file*: between the base folder and a single file, both in float16, and back."""


@dataclass
class FullArchitectureConfig:
    """Which architecture, and where the figures go."""

    architecture: Literal["sd15", "sd21_base", "sd21", "sdxl", "small", "small_21", "small_xl"] = (
        "sd15"
    )
    """Architecture of scripts/measurements/make_random_base.py."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the base folder; everything computes in float32."""
    output: str = "docs/full_architecture"
    """The two files to write, without .md and .json."""
    work: str = "runs/full_architecture"
    """Folder for what the verbs write; about 40 GB at the most for a full-size model."""
    resolution: int = 128
    """Side of the training images in px: 16x16 latents."""
    sample_px: int = 512
    """Side of the sampled picture in px: 64x64 latents."""
    training: list[str] = field(default_factory=list)
    """Further key=value settings of the training, such as schedule.shift.base_resolution=512."""
    variant: str = ""
    """Name of these figures beside the architecture's own, where `training` differs."""
    only: list[str] = field(default_factory=list)
    """Run only these verbs, by the first word of their names, and keep the figures of the others;
    they must need no more than the base folder."""
    keep: bool = False
    """Keep the weights in the work folder when all is done."""


def measure(config: FullArchitectureConfig) -> dict[str, Any]:
    """Runs what is not done yet and returns the figures of this architecture."""
    work = Path(config.work) / name_of(config).replace(" ", "_")
    state_file = work / "state.json"
    state: dict[str, Any] = _read(state_file) or {"verbs": {}}
    base = work / "base"
    making = [sys.executable, "-m", "blackpoint.scripts.measurements.make_random_base"]
    making += [f"architecture={config.architecture}", f"dtype={config.dtype}", f"output={base}"]
    make_base = Verb("make the base folder", making, holds="its largest part", writes=[base])
    if make_base.name not in state["verbs"]:
        write_photos(work / "photos")
        run_verb(make_base, work, state)
        state["parameters"] = count_parameters(base)
        _write(state_file, state)
    parameters = state["parameters"]
    wanted = verbs(work, parameters, config.resolution, config.sample_px, config.training)
    order = [make_base.name, *(verb.name for verb in wanted)]
    if config.only:
        wanted = [verb for verb in wanted if verb.name.split()[0] in config.only]
    else:
        check_room(work, state["verbs"], wanted)
    for verb in wanted:
        if verb.name not in state["verbs"]:
            run_verb(verb, work, state)
            _write(state_file, state)
    state["verbs"] = {name: state["verbs"][name] for name in order if name in state["verbs"]}
    if differences := _read(work / DIFFERENCES):
        state["differences"] = differences
    if not config.keep:
        for name in ("base", "shards", "latents", "photos"):
            shutil.rmtree(work / name, ignore_errors=True)
    settings = {
        key: value
        for key, value in asdict(config).items()
        if key not in ("output", "keep", "only") and value not in ("", [])
    }
    return {"settings": settings, **describe_machine(), **state}


def name_of(config: FullArchitectureConfig) -> str:
    """Returns the key of these figures: the architecture and, after a space, the variant."""
    return f"{config.architecture} {config.variant}".strip()


def run_verb(verb: Verb, work: Path, state: dict[str, Any]) -> None:
    """Runs one command and adds its row; raises RunFailed with the end of its log."""
    print(f"* {verb.name} ...", flush=True)
    for path in verb.writes:
        shutil.rmtree(path, ignore_errors=True)
    log = work / "logs" / f"{verb.name.replace(' ', '_').replace(',', '')}.log"
    on_look = stopper(verb.stop_after_a_step) if verb.stop_after_a_step else None
    environment = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    measured = run_measured(verb.command, log, environment, on_look)
    if measured.status != (STOPPED_BUT_RESUMABLE if on_look else 0):
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RunFailed(f"{verb.name} ended with status {measured.status} ({log}):\n{end}")
    for path in verb.done_with:
        shutil.rmtree(path, ignore_errors=True)
    state["verbs"][verb.name] = row(verb, measured)
    print(f"  {measured.seconds:.0f} s, {measured.peak_rss_bytes / GB:.2f} GB", flush=True)


def row(verb: Verb, measured: Measured) -> dict[str, Any]:
    """Returns what is kept of one command."""
    return {
        "seconds": round(measured.seconds, 1),
        "peak_rss_gb": round(measured.peak_rss_bytes / GB, 3),
        "peak_anonymous_gb": round(measured.peak_anonymous_bytes / GB, 3),
        "arithmetic_gb": round(verb.bytes_expected / GB, 3),
        "holds": verb.holds,
        "command": " ".join(["python", *verb.command[1:]]) if "-c" not in verb.command else "",
    }


def stopper(metrics: Path) -> Callable[[int], None]:
    """Returns a function that sends SIGTERM, once, when metrics.csv names the first step."""
    sent = False

    def look(pid: int) -> None:
        nonlocal sent
        if not sent and metrics.exists() and "\n1," in metrics.read_text(encoding="ascii"):
            sent = True
            os.kill(pid, signal.SIGTERM)

    return look


def count_parameters(base: Path) -> dict[str, int]:
    """Counts the parameters of each part from the headers of its safetensors, and of adapters."""
    counts, num_adapted = {}, 0
    ends = tuple(f".{target}.weight" for target in LoraConfig(rank=RANK).all_targets)
    for part in PARTS:
        for path in (base / part).glob("*.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            shapes = {name: entry["shape"] for name, entry in header.items()}
            counts[part] = sum(math.prod(shape) for shape in shapes.values())
            if part == "unet":
                adapted = [shape for name, shape in shapes.items() if name.endswith(ends)]
                num_adapted = sum(out + math.prod(others) for out, *others in adapted)
    return counts | {ADAPTERS: RANK * num_adapted}


def check_room(work: Path, done: dict[str, Any], wanted: Sequence[Verb]) -> None:
    """Raises UserError where memory or disk are too small for the verbs to come."""
    if any(", resumed for 2 more" in name for name in done):
        return
    needed = max(verb.bytes_expected for verb in wanted) + OVERHEAD_BYTES
    free = available_memory()
    if free is not None and free < needed:
        raise UserError(
            f"the largest verb needs {needed / GB:.1f} GB of memory and {free / GB:.1f} GB are "
            "free: end other programs, or use a larger machine"
        )
    # Twice that: of a fine-tune two checkpoints while one replaces the other (four fifths of what
    # training holds, each) and an export; of adapters exports alone.
    needed, free = 2 * (needed - OVERHEAD_BYTES), shutil.disk_usage(work).free
    if free < needed:
        raise UserError(
            f"work={work}: the verbs need {needed / GB:.0f} GB of disk and {free / GB:.0f} GB are "
            "free there; name another folder"
        )


def available_memory() -> int | None:
    """Returns the bytes that a new program can take, or None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


def write_photos(folder: Path) -> None:
    """Writes the photographs, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in CAPTIONS.items():
        photograph(name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """Writes the page: one table per architecture."""
    sections = [_section(name, result) for name, result in results.items()]
    return Page("Full architectures", [INTRODUCTION, *sections]).markdown()


def _written(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def _section(name: str, result: dict[str, Any]) -> Section:
    imports_gb = result["verbs"][IMPORTS]["peak_rss_gb"]
    counts = ", ".join(f"{part} {count:,}" for part, count in result["parameters"].items())
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    settings = shlex.join(f"{key}={_written(v)}" for key, v in result["settings"].items())
    lines = []
    for verb, row in result["verbs"].items():
        expected = row["arithmetic_gb"] or None
        over = (row["peak_rss_gb"] - imports_gb) / expected if expected else None
        peaks = (row["peak_rss_gb"], row["peak_anonymous_gb"])
        lines.append((verb, row["seconds"], *peaks, expected, over, row["holds"]))
    sizes = dict.fromkeys(["peak, GB", "not droppable, GB", "arithmetic, GB", "over"], ".2f")
    architecture, _, variant = name.partition(" ")
    return Section(
        TITLES[architecture] + (f", {variant}" if variant else ""),
        [
            f"Parameters: {counts}. {result['date']}, {result['machine']}; {versions}.\n"
            f"`python -m blackpoint.scripts.measurements.full_architecture {settings}`",
            Table.of({"verb": "", "seconds": ".0f", **sizes, "of": ""}, lines),
            *_equality(result.get("differences", {})),
        ],
    )


def _equality(differences: dict[str, Any]) -> list[str | Table]:
    if not differences:
        return []
    formats = {"": "", "largest value": ".3g", "largest difference": ".1e", "allowed": ".0e"}
    rows = [
        (name, row["largest"], row["difference"], row["tolerance"] or None)
        for name, row in differences.items()
    ]
    return ["Against diffusers' pipeline for this base, float32:", Table.of(formats, rows)]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Measures, writes both files and prints the table; returns the exit status."""
    try:
        config = load(FullArchitectureConfig, argv)
        figures = measure(config)
    except (UserError, RunFailed) as error:
        print(f"full_architecture: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    output = Path(config.output)
    results = _read(output.with_suffix(".json"))
    if config.only and name_of(config) in results:
        before = results[name_of(config)]
        results[name_of(config)] = before | figures | {"verbs": before["verbs"] | figures["verbs"]}
    else:
        results[name_of(config)] = figures
    _write(output.with_suffix(".json"), results)
    text = markdown(results)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
