"""Scores of each image by verifiers: alignment, preference, classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter

import torch

from blackpoint.sampling.evaluation.metric import (
    Evaluated,
    Metric,
    MetricConfig,
    Numbers,
    Pixels,
    Row,
    Source,
    mean_metric,
)
from blackpoint.sampling.evaluation.rows import column_digest
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.statistics.estimates import mean_score
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifiers
from blackpoint.sampling.verifiers.verifier import Verifier, checked_scores, of_images


@dataclass(frozen=True)
class Scores(MetricConfig):
    """The mean score of each verifier, by name."""

    verifiers: Mapping[str, VerifierConfig]

    def sources(self) -> list[Source]:
        sources = []
        for name, config in self.verifiers.items():
            settings = {k: v for k, v in asdict(config).items() if k not in ("batch_size", "name")}
            digests = {name: column_digest(settings)}
            sources.append(Source(name, digests, partial(_load, name, config)))
        return sources

    def numbers(self, evaluated: Evaluated) -> Numbers:
        metrics: list[Metric] = []
        notes: list[str] = []
        for name in filter(evaluated.has, self.verifiers):
            rows = [row for row in evaluated.rows if math.isfinite(row[name])]
            num_others = len(evaluated.rows) - len(rows)
            if num_others:
                notes.append(f"{name}: {num_others} images without a finite score left out")
            if rows:
                score = itemgetter(name)
                metrics.append(mean_metric(name, rows, score, "higher", estimate=mean_score))
        return metrics, notes


@dataclass(frozen=True)
class _Score:
    name: str
    verifier: Verifier

    def __call__(self, pixels: Pixels, prompts: Sequence[Prompt]) -> list[Row]:
        scores = checked_scores(self.verifier, pixels.float() / 255, [p.text for p in prompts])
        return [{self.name: float(score)} for score in scores]

    @property
    def check_prompt(self) -> object:
        return getattr(self.verifier, "check_prompt", None)


def _load(name: str, config: VerifierConfig, device: torch.device) -> _Score:
    loaded = load_verifiers({name: config}, device)
    return _Score(name, of_images(loaded)[name])
