"""The commands that are broken on purpose, small, and what must be the same of their results.

A command writes below `place`, whose path is the same for every start: nothing that it writes may
depend on how often it was started.
"""

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

from blackpoint.scripts.cli import main as command
from blackpoint.train.records.metrics_file import read_metrics
from tests import tiny_sweep
from tests.evaluations import arguments as evaluation
from tests.evaluations import write_prompts
from tests.hostile_models import SAMPLE
from tests.tiny_encode import arguments as encoding
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config

NUM_STEPS = 8
TRAINING: dict[str, Any] = {
    "trainer.max_steps": NUM_STEPS,
    "trainer.checkpoint_every_steps": 2,
    "trainer.validate_every_steps": 4,
    "data.validation_images": 4,
}
LORA: dict[str, Any] = {"lora.rank": 4, "lora.alpha": 2.0, "lora.dropout": 0.2}
PROMPTS = ["a red photo of snow", "a blue night", "a white wall"]
OF_A_START = ("environment.json", "config.yaml", "identity.json", "stamps.json", "log.txt")
OF_A_START += (".lock", "sent.json", "run_id", "README.md")
"""Files that tell of the start, not of the result: versions, paths, times."""
MEASURED = re.compile(r"(^|[_/.])(seconds|s|wait|started|ended|date|host|memory|peak)($|[_/.])")
"""Keys of JSON, columns and metrics that are measured on the machine."""

COSTS = re.compile(rb"[\d.]+ s, peak memory [\d.]+ GB")


@dataclass(frozen=True)
class Verb:
    """A command: its arguments for an output, and where it writes what a kill should hit."""

    arguments: Callable[..., list[str]]
    """Of the assets, the output, and a training's further settings."""
    aim: str = ""
    weight: int = 1


@dataclass
class Assets:
    """Good inputs, made once."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Assets":
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_tiny_pipeline(folder / "pipeline")
            make_tiny_shards(folder / "images", 24)
            write_prompts(folder / "prompts.jsonl")
            assets = cls(folder)
            for name, verb in (("run", "train"), ("search", "search")):
                assert command(VERBS[verb].arguments(assets, folder / name)) == 0
            (folder / "complete").touch()
        return cls(folder)

    @property
    def pipeline(self) -> Path:
        return self.folder / "pipeline"

    @property
    def shards(self) -> Path:
        return self.folder / "images" / "shards"


def train(assets: Assets, out: Path, **values: Any) -> list[str]:
    """Returns a training of few steps; its YAML lies beside the output."""
    given = TRAINING | {"data.validation_shards": str(assets.shards)} | values
    config = tiny_config(out, assets.pipeline, assets.shards, **given)
    path = assets.folder / f"train_{hashlib.sha1(repr(given).encode()).hexdigest()[:8]}.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    return ["train", str(path)]


def lora(assets: Assets, out: Path, **values: Any) -> list[str]:
    return train(assets, out, **(LORA | values))


def encode(assets: Assets, out: Path, **values: Any) -> list[str]:
    return encoding(assets.shards, assets.pipeline, out, **values)


def pack(assets: Assets, out: Path) -> list[str]:
    given = [f"source={assets.folder / 'images' / 'source'}", f"output={out}"]
    return ["data", "pack", *given, "samples_per_shard=2", "num_processes=2"]


def search(assets: Assets, out: Path) -> list[str]:
    given = [f"checkpoint={assets.pipeline}", f"prompts={json.dumps(PROMPTS)}", f"output={out}"]
    given += ["budget_nfe=40", "num_steps=4", "guidance_scale=1", "batch_size=1", "device=cpu"]
    given += ["verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
    return ["search", *given, "algorithm=zero_order"]


def evaluate(assets: Assets, out: Path) -> list[str]:
    given = evaluation(assets.pipeline, assets.folder / "prompts.jsonl", out, "batch_size=1")
    return ["evaluate", *given]


def sweep(assets: Assets, out: Path) -> list[str]:
    given = {**tiny_sweep.EVALUATE, "checkpoint": str(assets.pipeline), "batch_size": 1}
    grid = {"evaluate.seed": [0, 1]}
    path = assets.folder / "sweep.yaml"
    content = {"run_dir": str(out), "evaluate": given, "grid": grid}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return ["sweep", str(path)]


def export(assets: Assets, out: Path) -> list[str]:
    return ["export", f"checkpoint={assets.folder / 'run'}", f"output={out}"]


def sample(assets: Assets, out: Path) -> list[str]:
    given = [option for option in SAMPLE if not option.startswith(("output=", "prompts="))]
    given += [f"checkpoint={assets.pipeline}", f"output={out}", "num_images=4", "batch_size=1"]
    return [*given, f"prompts={json.dumps(PROMPTS)}"]


def report(assets: Assets, out: Path) -> list[str]:
    return ["report", f"run_dir={assets.folder / 'search'}", f"output={out / 'page.html'}"]


VERBS = {
    "train": Verb(train, "out/checkpoints", 26),
    "train LoRA": Verb(lora, "out/checkpoints", 20),
    "data encode": Verb(encode, "", 10),
    "data pack": Verb(pack, "", 10),
    "search": Verb(search, "", 10),
    "evaluate": Verb(evaluate, "", 7),
    "sample": Verb(sample, "", 3),
    "export": Verb(export, "", 6),
    "report": Verb(report, "", 4),
    "sweep": Verb(sweep, "", 2),
}


# --- What must be the same ---


def contents(folder: Path) -> dict[str, str]:
    """Returns a digest of each file's content, without what is measured; by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {
        name: hashlib.sha256(content(path)).hexdigest()
        for name, path in names.items()
        if path.name not in OF_A_START and "wandb" not in path.parts
    }


def content(path: Path) -> bytes:
    """Returns a file's content, without what is measured."""
    match path.suffix:
        case ".ckpt":
            parts = list(flat(torch.load(path, weights_only=True, map_location="cpu")))
            return b"".join(parts)
        case ".safetensors":  # whose metadata have no order
            data = path.read_bytes()
            size = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:size])
            header["__metadata__"] = without_measured(header.get("__metadata__", {}))
            return json.dumps(header, sort_keys=True).encode() + data[size:]
        case ".json":
            value = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "encoding.json":
                del value["source"]  # its place; its content has a digest beside it
            return text(value)
        case ".jsonl":  # rows come in the order in which they were done
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return b"\n".join(sorted(map(text, rows)))
        case ".parquet":
            return b"\n".join(sorted(map(text, pq.read_table(path).to_pylist())))
        case ".csv" if path.name == "metrics.csv":
            return text(read_metrics(path))
        case ".csv":
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
            return text(rows)
        case ".md" | ".html":
            return COSTS.sub(b"", path.read_bytes())
    return path.read_bytes()


def text(value: Any) -> bytes:
    return json.dumps(without_measured(value), sort_keys=True, default=str).encode()


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not MEASURED.search(str(k))}
        return {k: without_measured(v) for k, v in kept.items()}
    return [without_measured(item) for item in value] if isinstance(value, list | tuple) else value


def flat(value: Any, name: str = "") -> Iterable[bytes]:
    """Yields names and bits of all that a checkpoint holds, but callbacks' own clocks."""
    if isinstance(value, torch.Tensor):
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            if not MEASURED.search(str(key)):
                yield from flat(value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from flat(item, f"{name}/{number}")
    else:
        yield f"{name} {value!r}".encode()


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names the files that differ: `-` missing, `+` left over, `!` other content."""
    signs = {(True, False): "+", (False, True): "-", (True, True): "!"}
    return [
        f"{signs[name in found, name in expected]}{name}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
