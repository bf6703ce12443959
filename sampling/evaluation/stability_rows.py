"""What the searches of a stability study have left: scores by prompt and noise."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blackpoint.data.files.plain import number
from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_arms import (
    BEST_OF,
    POOL,
    Arm,
    Place,
    arms,
    guidance_name,
    optimisations,
    stability_scores,
)
from blackpoint.sampling.search.journal import ROWS, read_rows
from blackpoint.sampling.search.winners import WINNERS

Scores = dict[str, np.ndarray]
"""Column -> (P, K): a row a prompt, a column a noise; NaN where a verifier gave no number."""


@dataclass(frozen=True)
class Noises:
    """Candidates of one search, by prompt and number."""

    prompts: list[int]
    texts: list[str]
    seeds: np.ndarray  # (P, K)
    scores: Scores
    seconds: float

    @property
    def num_pairs(self) -> int:
        """Returns the number of (prompt, noise) pairs."""
        return self.seeds.size


@dataclass(frozen=True)
class Ascent:
    """One noise optimisation of each prompt, ordered by prompt."""

    kind: str
    quality: Scores  # (P,)
    first: np.ndarray
    """What was ascended, of the noise that it began with, (P,)."""
    best: np.ndarray
    """And of the best noise that it saw."""
    steps: np.ndarray
    """Gradient steps that were taken before the budget's end, or before it diverged."""
    seconds: float


@dataclass(frozen=True)
class Found:
    """Everything that was measured at one place."""

    config: StabilityStudyConfig
    place: Place
    pool: Noises
    best_of: Noises
    guided: dict[float, Noises]
    """Plain images at other guidance scales, one a prompt."""
    ascents: list[Ascent]

    @property
    def stability(self) -> list[str]:
        """Names of the stability scores, the one that selects first."""
        return list(stability_scores(self.config, self.place.num_steps))

    @property
    def quality(self) -> list[str]:
        """Names of the quality scores, the one that is searched with first."""
        return list(self.config.quality)

    @functools.cached_property
    def first_quality(self) -> str:
        """The quality score that the rival searches with."""
        return self.quality[0]


def read_found(config: StabilityStudyConfig, place: Place) -> Found:
    """Reads one place, whose searches must be done."""
    by_name = {arm.name: arm for arm in arms(config, place)}
    return Found(
        config,
        place,
        read_noises(by_name[POOL]),
        read_noises(by_name[BEST_OF]),
        {
            scale: read_noises(by_name[guidance_name(scale)])
            for scale in config.rival_guidance_scales
            if scale != config.guidance_scale
        },
        [
            read_ascent(config, kind, by_name[f"optimise_{kind}"])
            for kind in optimisations(config, place)
        ],
    )


def read_noises(arm: Arm) -> Noises:
    """Reads every candidate of a random search."""
    rows: dict[int, dict[int, dict[str, Any]]] = {}
    for row in _rows(arm, ROWS):
        rows.setdefault(row["prompt_index"], {})[row["candidate"]] = row
    prompts = sorted(rows)
    count = min(len(found) for found in rows.values())
    table = [[rows[prompt][number] for number in range(count)] for prompt in prompts]
    names = list(table[0][0]["scores"])
    return Noises(
        prompts,
        [line[0]["prompt"] for line in table],
        np.array([[row["seed"] for row in line] for line in table], dtype=np.int64),
        {
            name: np.array([[number(row["scores"][name]) for row in line] for line in table])
            for name in names
        },
        _seconds(arm),
    )


def read_ascent(config: StabilityStudyConfig, kind: str, arm: Arm) -> Ascent:
    """Reads the winners of a noise optimisation."""
    winners = sorted(_rows(arm, WINNERS), key=lambda row: row["prompt_index"])
    tried: dict[int, int] = {}
    for row in _rows(arm, ROWS):
        tried[row["prompt_index"]] = tried.get(row["prompt_index"], 0) + 1
    [name] = arm.config.verifiers
    judged = [row["held_out"] | row["scores"] for row in winners]
    return Ascent(
        kind,
        {quality: np.array([number(row[quality]) for row in judged]) for quality in config.quality},
        np.array([number(row["baseline"]["scores"][name]) for row in winners]),
        np.array([number(row["scores"][name]) for row in winners]),
        np.array([tried[row["prompt_index"]] for row in winners]),
        _seconds(arm),
    )


def _rows(arm: Arm, name: str) -> list[dict[str, Any]]:
    return read_rows(Path(arm.config.output) / name, repair=False)


def _seconds(arm: Arm) -> float:
    """Returns what the search has spent, the encoding of prompts and loading not counted."""
    ledger = json.loads((Path(arm.config.output) / "ledger.json").read_text(encoding="utf-8"))
    return sum(ledger[name] for name in ("denoising_s", "decoding_s", "verifying_s"))
