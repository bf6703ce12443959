"""`make full-architecture`: every verb on a full-size Stable Diffusion with random weights.

Each verb runs as a command of its own, as a user would start it, and its wall time and peak memory
stand beside the arithmetic: what its weights, gradients, moments and average must take. Training
goes from cached latents, is stopped by SIGTERM after two steps and resumed for two more.

A finished verb is kept in the work folder and not run again: after a break the same command
continues. Writes OUTPUT.json (all architectures measured so far) and OUTPUT.md.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.scripts.config import load
from blackpoint.scripts.measurements.full_architecture_table import markdown
from blackpoint.scripts.measurements.full_architecture_verbs import Verb, verbs
from blackpoint.scripts.measurements.measured_process import Measured, run_measured
from blackpoint.scripts.measurements.photographs import CAPTIONS, photograph
from blackpoint.scripts.stand_alone import describe_machine

GB = 1e9
STOPPED_BUT_RESUMABLE = 75
OVERHEAD_BYTES = 1.5e9  # interpreter, libraries and activations


@dataclass
class FullArchitectureConfig:
    """Which architecture, and where the figures go."""

    architecture: Literal["sd15", "sd21_base", "sd21", "small", "small_21"] = "sd15"
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
    if config.only:
        wanted = [verb for verb in wanted if verb.name.split()[0] in config.only]
    else:
        check_room(work, state["verbs"], parameters["unet"])
    for verb in wanted:
        if verb.name not in state["verbs"]:
            run_verb(verb, work, state)
            _write(state_file, state)
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
    """Counts the parameters of each part from the headers of its safetensors."""
    counts = {}
    for part in ("unet", "vae", "text_encoder"):
        [path] = (base / part).glob("*.safetensors")
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        item = 2 if next(iter(header.values()))["dtype"] == "F16" else 4
        spans = [entry["data_offsets"] for entry in header.values()]
        counts[part] = sum(end - start for start, end in spans) // item
    return counts


def check_room(work: Path, done: dict[str, Any], num_parameters: int) -> None:
    """Raises UserError where memory or disk are too small for the training that is to come."""
    if any(name.startswith("train, resumed") for name in done):
        return
    needed = 20 * num_parameters + OVERHEAD_BYTES
    free = available_memory()
    if free is not None and free < needed:
        raise UserError(
            f"training needs {needed / GB:.1f} GB of memory and {free / GB:.1f} GB are free: end "
            "other programs, or use a larger machine"
        )
    # two checkpoints while one replaces the other (weights, average, two moments) and an export
    needed, free = (2 * 16 + 8) * num_parameters, shutil.disk_usage(work).free
    if free < needed:
        raise UserError(
            f"work={work}: training needs {needed / GB:.0f} GB of disk and {free / GB:.0f} GB are "
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
        results[name_of(config)]["verbs"] |= figures["verbs"]
    else:
        results[name_of(config)] = figures
    _write(output.with_suffix(".json"), results)
    text = markdown(results)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
