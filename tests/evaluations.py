"""Small evaluations of a random model: what their tests share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blackpoint.sampling.evaluation.config import MetricsConfig
from blackpoint.sampling.evaluation.metric import Metric
from blackpoint.sampling.evaluation.run import evaluate_to_folder
from blackpoint.sampling.evaluation.summary import Summary
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.scripts.config import load

PROMPTS = [
    {"prompt": "a cat on a black background", "category": "dark"},
    {"prompt": "a dog on a white background", "category": "bright"},
    {"prompt": "snow", "category": "bright", "luminance": [0.5, 1.0]},
    {"prompt": "a street", "luminance": None},
    {"prompt": "a house"},
]


def write_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def write_reference(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        size = (16, 16) if number else (40, 24)
        pixels = (rng.random((size[1], size[0], 3)) * 255 * (number + 1) / 7).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def arguments(pipeline: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={pipeline}",
        f"prompts={prompts}",
        f"output={output}",
        "num_images=2",
        "num_steps=2",
        "guidance_scale=2",
        "batch_size=4",
        "brightness.invariance_noises=2",
        "verifiers.dark.kind=luminance",
        "verifiers.dark.target=0",
        *more,
    ]


def with_sets(reference: Path) -> list[str]:
    return [
        f"sets.reference={reference}",
        "sets.features.module=tests.tiny_vision:ThreeColors",
        "sets.classifier.module=tests.tiny_vision:ThreeColors",
    ]


def evaluate(given: list[str], task: Task | None = None) -> Summary:
    found = evaluate_to_folder(load(MetricsConfig, given), task or Task())
    assert found is not None
    return found


def metric(summary: Summary, name: str, group: str = "") -> Metric:
    [found] = [each for each in summary.metrics if (each.name, each.group) == (name, group)]
    return found


def numbers(summary: Summary) -> list[tuple[Any, ...]]:
    return [(each.name, each.group, each.estimate) for each in summary.metrics]
