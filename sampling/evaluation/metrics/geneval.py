"""GenEval's scores from the file that its detector writes (Ghosh et al. 2023).

One row per image: `prompt`, `tag` (the task) and `correct`. A task's score is the share of its
correct images, the overall score the mean of the tasks' (553 prompts, six tasks, four images per
prompt, as published). Intervals are bootstraps over prompts, within each task: images of one prompt
are not independent. Where all prompts have one share they are Wilson's of the prompts: a bootstrap
would leave no doubt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.metric import Evaluated, Metric, MetricConfig, Numbers
from blackpoint.sampling.statistics.estimates import (
    NUM_RESAMPLES,
    Estimate,
    bca_interval,
    influences,
    proportion,
)

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class GenEvalScores:
    """Shares of correct images; n counts prompts."""

    overall: Estimate
    tasks: dict[str, Estimate]
    missing: tuple[str, ...]
    """Published tasks that the file has no image of; `overall` is the mean of the others."""


class GenEval(MetricConfig):
    """The scores in a file of GenEval's detector, if one is given; raises UserError for another."""

    def __init__(self, path: str | None, seed: int = 0) -> None:
        self.scores = None if path is None else read_geneval(path, seed=seed)

    def numbers(self, evaluated: Evaluated) -> Numbers:
        if self.scores is None:
            return [], []
        scores = {"": self.scores.overall, **self.scores.tasks}
        metrics = [Metric("GenEval", *score, "prompts", "higher") for score in scores.items()]
        missing = ", ".join(self.scores.missing)
        return metrics, [f"GenEval: no images of {missing}"] if missing else []


def read_geneval(path: str | Path, seed: int = 0) -> GenEvalScores:
    """Reads results.jsonl; raises UserError for a file that is not one."""
    by_task: dict[str, dict[str, list[bool]]] = {}
    for number, line in enumerate(_lines(Path(path)), 1):
        if not line.strip():
            continue
        row = _row(path, number, line)
        by_task.setdefault(row["tag"], {}).setdefault(row["prompt"], []).append(row["correct"])
    if not by_task:
        raise UserError(f"{path} holds no rows; give the results.jsonl of GenEval's detector")
    rng = np.random.default_rng(seed)
    values, resampled, influence = {}, {}, {}
    for task in sorted(by_task, key=_place):
        prompts = list(by_task[task].values())
        right = np.array([sum(answers) for answers in prompts], dtype=np.float64)
        count = np.array([len(answers) for answers in prompts], dtype=np.float64)
        drawn = rng.integers(len(prompts), size=(NUM_RESAMPLES, len(prompts)))
        values[task] = float(right.sum() / count.sum())
        resampled[task] = right[drawn].sum(axis=1) / count[drawn].sum(axis=1)
        if len(prompts) > 1:
            left_out = (right.sum() - right) / (count.sum() - count)
            influence[task] = influences(left_out)
    tasks = {
        task: _share(value, resampled[task], [influence.get(task)], len(by_task[task]))
        for task, value in values.items()
    }
    overall = float(np.mean(list(values.values())))
    spread = np.mean(list(resampled.values()), axis=0)
    parts = [None if task not in influence else influence[task] / len(values) for task in values]
    num_prompts = sum(map(len, by_task.values()))
    return GenEvalScores(
        _share(overall, spread, parts, num_prompts),
        tasks,
        tuple(task for task in TASKS if task not in by_task),
    )


def _share(
    value: float, resampled: np.ndarray, influence: Sequence[np.ndarray | None], n: int
) -> Estimate:
    """Gives a share of n prompts its interval; a task of a single prompt adds no spread."""
    known = [value for value in influence if value is not None]
    if not known or np.ptp(resampled) == 0:
        wilson = proportion(round(value * n), n)
        return Estimate(value, min(value, wilson.low), max(value, wilson.high), n)
    return Estimate(value, *bca_interval(value, resampled, known), n)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # \u2028 ends no row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the results.jsonl of GenEval's detector"
        ) from None


def _row(path: str | Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"prompt", "tag", "correct"} <= row.keys():
        raise UserError(
            f"{path}:{number}: not a row of GenEval's results; each holds prompt, tag and correct"
        )
    if not isinstance(row["correct"], bool):
        raise UserError(f"{path}:{number}: correct={row['correct']!r} must be true or false")
    return row


def _place(task: str) -> tuple[int, str]:
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)
