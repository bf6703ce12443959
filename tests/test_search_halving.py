"""Halving: where it prunes, against best-of-N on published rank correlations, and old folders."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from blackpoint.sampling.process import Process
from blackpoint.sampling.search.algorithms.halving import (
    FORMER,
    HalvingConfig,
    halving,
    plan,
    shares,
)
from blackpoint.sampling.search.calibration import correlation
from blackpoint.sampling.search.problem import Correlation, Problem
from blackpoint.sampling.search.run import search_to_folder
from tests.test_search import expected_maximum
from tests.test_search_verb import config, rows
from tests.toy_denoisers import ZERO_SNR

STEPS, LEVELS = 20, (5, 10, 15)
# TTSnap (2511.22242), 200 prompts x 200 noises x 20 steps: Kendall's tau of preview and final score
# after 5, 10, 15 steps; and what three levels that keep half lose to best-of-8, in shares of
# best-of-32's gain.
PUBLISHED = {
    "FLUX HPS": ((0.23, 0.45, 0.62), 0.00),
    "FLUX ImageReward": ((0.27, 0.61, 0.80), 0.05),
    "FLUX PickScore": ((0.21, 0.49, 0.70), 0.02),
    "SDXL HPS": ((0.18, 0.34, 0.53), -0.07),
    "SDXL ImageReward": ((0.23, 0.55, 0.75), 0.03),
    "SDXL PickScore": ((0.20, 0.41, 0.66), -0.03),
}
OLD = HalvingConfig(**FORMER)
Scores = tuple[np.ndarray, dict[int, np.ndarray]]


def normal_scores(taus: Any, shape: tuple[int, int], rng: np.random.Generator) -> Scores:
    """Final scores and previews: a Markov chain of normals, tau = 2 / pi arcsin rho."""
    final = before = rng.standard_normal(shape)
    previews, last = {}, 1.0
    for level, tau in reversed(list(zip(LEVELS, taus, strict=True))):
        rho = math.sin(math.pi * tau / 2)
        part = rho / last
        before = part * before + math.sqrt(1 - part**2) * rng.standard_normal(shape)
        previews[level], last = before, rho
    return final, previews


def clayton_scores(taus: Any, shape: tuple[int, int], rng: np.random.Generator) -> Scores:
    """The same taus without dependence in the upper tail: bad previews tell, good ones do not."""
    uniform, previews = rng.random(shape), {}
    for level, tau in zip(LEVELS, taus, strict=True):
        theta, w = 2 * tau / (1 - tau), rng.random(shape)
        inner = (w ** (-theta / (1 + theta)) - 1) * uniform**-theta + 1
        previews[level] = inner ** (-1 / theta)
    return stats.norm.ppf(uniform), previews


def mixed_scores(taus: Any, shape: tuple[int, int], rng: np.random.Generator) -> Scores:
    """Half of the prompts each: this reproduces the published losses."""
    half = (shape[0] // 2, shape[1])
    one, two = normal_scores(taus, half, rng), clayton_scores(taus, half, rng)
    return np.concatenate([one[0], two[0]]), {
        level: np.concatenate([one[1][level], two[1][level]]) for level in LEVELS
    }


def problem_of(budget: int, kendall: Mapping[int, Correlation] | None = None) -> Problem:
    grid = Process(ZERO_SNR).grid(STEPS)
    return Problem(0, 0, grid, lambda a, b, _=None: b - a, budget, kendall=kendall)


def best_of(
    draw: Any, taus: Any, pruned: Mapping[int, float], count: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the winners' scores of 20,000 searches, chosen as `walk` chooses."""
    final, previews = draw(taus, (20_000, count), rng)
    kept = np.tile(np.arange(count), (len(final), 1))
    for level, keep in pruned.items():
        order = np.argsort(-np.take_along_axis(previews[level], kept, 1), axis=1)
        kept = np.take_along_axis(kept, order[:, : max(1, round(kept.shape[1] * keep))], 1)
    return np.take_along_axis(final, kept, 1).max(axis=1)


def measured(draw: Any, taus: Any, num_prompts: int, rng: np.random.Generator) -> Any:
    """Calibrates on 8 runs of each prompt."""
    final, previews = draw(taus, (num_prompts, 8), rng)
    i, j = np.triu_indices(8, 1)
    signs = np.sign(final[:, i] - final[:, j])
    return {
        level: correlation((signs * np.sign(x[:, i] - x[:, j])).mean(axis=1).tolist())
        for level, x in previews.items()
    }


def advantage(
    draw: Any, taus: Any, config: HalvingConfig, budget: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Returns the share of best-of-32's gain by which 40 calibrated searches beat best-of-N at the
    same NFE, and its standard error."""
    plans: Counter[tuple[Any, int]] = Counter()
    for _ in range(40):
        kendall = measured(draw, taus, config.calibration_prompts, rng)
        pruned, count = plan(problem_of(budget, kendall), config)
        plans[tuple(pruned.items()), count] += 1
    scale, plain = expected_maximum(32), expected_maximum(budget // STEPS)
    mean = variance = 0.0
    for (pruned, count), times in plans.items():
        if pruned:  # else it is best-of-N
            found = best_of(draw, taus, dict(pruned), count, rng)
            mean += times / 40 * (found.mean() - plain) / scale
            variance += (times / 40 * found.std() / scale) ** 2 / len(found)
    return mean, math.sqrt(variance)


@pytest.mark.slow
def test_the_simulation_loses_what_was_published() -> None:
    rng = np.random.default_rng(0)
    pruned = dict.fromkeys(LEVELS, 0.5)
    _, count = plan(problem_of(8 * STEPS), HalvingConfig())
    for taus, published in PUBLISHED.values():
        found = best_of(mixed_scores, taus, pruned, count, rng).mean() - expected_maximum(8)
        assert found / expected_maximum(32) == pytest.approx(published, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [normal_scores, mixed_scores])
def test_halving_is_never_worse_than_best_of_n_and_once_was(draw: Any) -> None:
    """At 4, 8 and 19 images of 20 steps; four standard errors of the simulation."""
    rng = np.random.default_rng(1)
    old = []
    for name, (taus, _) in PUBLISHED.items():
        for num_images in (4, 8, 19):
            budget = num_images * STEPS
            mean, error = advantage(draw, taus, HalvingConfig(), budget, rng)
            assert mean > -4 * error - 1e-9, (name, num_images)
            old.append(advantage(draw, taus, OLD, budget, rng))
    assert min(mean + 4 * error for mean, error in old) < -0.02


def test_the_share_that_stays_follows_the_bound() -> None:
    taus = {5: Correlation(0.6, 0.29), 10: Correlation(0.6, 0.4), 15: Correlation(0.9, 0.76)}
    assert shares(HalvingConfig(), STEPS, taus) == {10: 0.7, 15: 0.35}
    assert shares(HalvingConfig(keep=0.6), STEPS, taus) == {10: 0.6, 15: 0.6}
    assert shares(OLD, STEPS, taus) == {5: 0.5, 10: 0.5, 15: 0.5}
    assert shares(HalvingConfig(guard="mean"), STEPS, taus) == {5: 0.5, 10: 0.5, 15: 0.35}
    assert shares(HalvingConfig(), STEPS, {5: Correlation(0.9, -1.0)}) == {}
    assert shares(HalvingConfig(), STEPS, None) == dict.fromkeys(LEVELS, 0.5)


def test_pruning_that_starts_no_more_noises_is_left_out() -> None:
    """8 runs of 20 steps: 9 that keep 6 after 15 steps would take 165."""
    kendall = {15: Correlation(0.5, 0.4)}
    assert plan(problem_of(160, kendall), HalvingConfig()) == ({}, 8)
    assert plan(problem_of(170, kendall), HalvingConfig()) == ({15: 0.7}, 9)
    assert plan(problem_of(160, kendall), replace(OLD, keep=0.7)) == ({15: 0.7}, 8)
    assert len(next(halving(problem_of(160, kendall), HalvingConfig()))) == 8


def test_an_old_folder_goes_on_with_its_own_settings(pipeline: Path, tmp_path: Path) -> None:
    """Written without today's keys, and with the mean correlation alone."""
    former = {"algorithm": "halving", "halving": OLD}
    asked = config(pipeline, tmp_path / "out", held_out={}, **former)
    output, _ = search_to_folder(asked)
    whole = rows(output, "candidates.jsonl")
    settings = json.loads((output / "search.json").read_text())
    del settings["halving"]["guard"], settings["draft"]
    (output / "search.json").write_text(json.dumps(settings))
    found = output / "calibration" / "kendall.json"
    taus = json.loads(found.read_text())
    found.write_text(json.dumps({k: correlation(each).value for k, each in taus.items()}))
    for name in ("hacking.json", "winners.jsonl"):
        (output / name).unlink()
    (output / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole[:3]))
    for _ in range(2):
        search_to_folder(config(pipeline, output, held_out={}, algorithm="halving"))
        again = rows(output, "candidates.jsonl")
        assert [(row["candidate"], row["score"]) for row in again] == [
            (row["candidate"], row["score"]) for row in whole
        ]
    assert json.loads((output / "search.json").read_text())["halving"]["guard"] == "mean"
