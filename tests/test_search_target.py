"""Searches that end at a target, and searches beside best-of-N at their cost."""

import itertools
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report.search_page import search_section
from blackpoint.sampling.search.algorithms.draft import DraftConfig, draft
from blackpoint.sampling.search.algorithms.halving import HalvingConfig
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.algorithms.zero_order import ZeroOrderConfig, zero_order
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.driver import drive
from blackpoint.sampling.search.journal import Journal
from blackpoint.sampling.search.problem import Problem
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.statistics.best_of_n import (
    comparison,
    expected_bests,
    passing_chance,
    table_of,
)
from blackpoint.sampling.statistics.table import Table
from blackpoint.sampling.verifiers.load import VerifierConfig
from tests.search_problems import GaussianModel, linear, runner
from tests.test_search import expected_maximum
from tests.test_search_verb import config, rows

ALGORITHMS: dict[str, Any] = {
    "random": lambda problem: random_search(problem, RandomSearchConfig()),
    "zero_order": lambda problem: zero_order(problem, ZeroOrderConfig()),
    "draft": lambda problem: draft(problem, DraftConfig(num_whole=6)),
}
EACH = pytest.mark.parametrize("name", ALGORITHMS)


def search(one: Any, folder: Path, name: str, target: float | None, budget: int = 160) -> list[Any]:
    journal = Journal(folder)
    try:
        problems = [
            Problem(index, 0, one.grid, one.cost, budget, target=target)
            for index in range(len(one.prompts))
        ]
        found = drive(one, journal, problems, ALGORITHMS[name])
    finally:
        journal.close()
    return sorted(found, key=lambda each: each.problem.prompt_index)


def candidates(folder: Path) -> dict[int, list[dict[str, Any]]]:
    found = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    found.sort(key=lambda row: (row["prompt_index"], row["candidate"]))
    keys = ("candidate", "parent", "seed", "goal", "round", "score", "nfe")
    return {
        index: [{key: row[key] for key in keys} for row in group]
        for index, group in itertools.groupby(found, key=lambda row: row["prompt_index"])
    }


@EACH
def test_a_search_ends_with_the_first_image_that_reaches_the_target(
    name: str, tmp_path: Path
) -> None:
    """Its candidates are the first of the search without a target, in any batch."""
    whole = search(runner(6), tmp_path / "whole", name, None)
    target = float(np.median([each.best.score for each in whole]))
    model = GaussianModel()
    one = runner(6, model, batch_size=5)
    found = search(one, tmp_path / "target", name, target)
    assert model.rows == one.ledger.nfe == sum(each.spent_nfe for each in found)
    every, mine = candidates(tmp_path / "whole"), candidates(tmp_path / "target")
    for before, now in zip(whole, found, strict=True):
        index = now.problem.prompt_index
        assert mine[index] == every[index][: len(mine[index])]
        assert now.spent_nfe == sum(row["nfe"] for row in mine[index]) <= 160
        finals = [row for row in mine[index] if row["goal"] == "final"]
        assert all(row["score"] < target for row in finals[:-1])
        if before.best.score >= target:
            assert now.best.score == finals[-1]["score"] >= target
        else:
            assert len(mine[index]) == len(every[index]) and now.best.score == before.best.score
    assert sum(each.spent_nfe for each in found) < sum(each.spent_nfe for each in whole)
    again = search(runner(6, batch_size=1), tmp_path / "one", name, target)
    assert [each.best.trial for each in again] == [each.best.trial for each in found]


@EACH
def test_a_killed_search_with_a_target_pays_nothing_twice(name: str, tmp_path: Path) -> None:
    whole = search(runner(3), tmp_path / "whole", name, 1.2)
    calls = 0

    class Killed(Exception):
        pass

    def killing(images: Any, prompts: Any, previews: Any = None) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise Killed
        return linear(images, prompts)

    with pytest.raises(Killed):
        search(runner(3, verifier=killing, batch_size=2), tmp_path / "broken", name, 1.2)
    before = sum(row["nfe"] for group in candidates(tmp_path / "broken").values() for row in group)
    model = GaussianModel()
    again = search(runner(3, model, batch_size=2), tmp_path / "broken", name, 1.2)
    assert before + model.rows == sum(each.spent_nfe for each in whole)
    assert candidates(tmp_path / "broken") == candidates(tmp_path / "whole")
    assert [each.best.score for each in again] == [each.best.score for each in whole]


def test_the_expected_best_of_n_runs() -> None:
    scores = [0.1, 0.9, 0.3, 0.8, 0.4]
    for n in (1, 2, 5):
        subsets = list(itertools.combinations(scores, n))
        assert expected_bests([scores], n) == pytest.approx([fmean(map(max, subsets))])
        passed = fmean(max(subset) >= 0.8 for subset in subsets)
        assert passing_chance(scores, 0.8, n) == pytest.approx(passed)
    middle = fmean([*expected_bests([scores], 2), *expected_bests([scores], 3)])
    assert expected_bests([scores], 2.5) == pytest.approx([middle])
    assert passing_chance(scores, 0.8, 7) == pytest.approx(1 - 0.6**7)
    assert passing_chance(scores, 2.0, 9) == 0.0 and passing_chance(scores, 0.0, 1) == 1.0


def test_the_expected_best_of_more_runs_than_there_are() -> None:
    """Normal scores grow as normals do, and log-probabilities stay below 0."""
    scores = np.random.default_rng(0).standard_normal((1000, 8))
    found = np.mean(expected_bests(scores.tolist(), 32))
    error = 2 * scores.std() / len(scores) ** 0.5  # the last doubling counts 1.6 times
    assert abs(found - expected_maximum(32)) < 0.02 * expected_maximum(32) + 3 * error
    skewed = -np.exp(2 * scores)
    found = np.mean(expected_bests(skewed[:200].tolist(), 64))
    assert np.mean(skewed[:200].max(axis=1)) < found < 0


def test_best_of_n_of_a_random_search_is_read_from_its_own_images() -> None:
    """Images until the target: 1, 2, 4, and 5 without it; 12 in all, so best-of-3 passes twice."""
    counts, scores = [1, 2, 4, 5], [1.0, 1.1, 1.2, 0.4]
    winners = [
        {"prompt_index": index, "nfe": 10 * count, "score": score}
        for index, (count, score) in enumerate(zip(counts, scores, strict=True))
    ]
    own, other = comparison("random", winners, [{"nfe": 10}], [], 0.9)
    assert (own["passed"], own["NFE per prompt"], other["search"]) == (0.75, 30, "best-of-3")
    assert other["passed"] == 0.5 and other["mean score"] is None
    assert [each["search"] for each in comparison("zero_order", winners, [], [], 0.9)] == [
        "zero_order"
    ]
    assert comparison("random", winners, [], [], None) == []


def table_in(output: Path) -> list[Any]:
    section = search_section(output)
    assert section is not None
    tables = [part for part in section.content if isinstance(part, Table)]
    [table] = [table for table in tables if "search" in table.columns]
    return list(table.rows)


def test_a_prompt_of_three_finite_runs_is_left_out() -> None:
    """Two doublings of three runs overlap: of normal scores the best of 32 came to 2.8, not 2.1."""
    winners = [{"prompt_index": index, "nfe": 320, "score": 2.0} for index in range(3)]
    runs = [
        {"prompt_index": index, "candidate": k, "goal": "final", "nfe": 10, "parent": None}
        | {"score": float(k) if index or k < 3 else None}
        for index in range(3)
        for k in range(8)
    ]
    _, paired, best_of_32 = comparison("halving", winners, [], runs, None)
    assert paired["prompts"] == best_of_32["prompts"] == 2


def test_a_target_is_reported_beside_best_of_n(pipeline: Path, tmp_path: Path) -> None:
    plain, _ = search_to_folder(config(pipeline, tmp_path / "plain"))
    scores = [row["score"] for row in rows(plain, "candidates.jsonl")]
    target = float(np.quantile(scores, 0.7))
    output, lines = search_to_folder(config(pipeline, tmp_path / "out", target=target))
    winners = rows(output, "winners.jsonl")
    own, other = table_in(output)
    assert own["prompts"] == other["prompts"] == 2
    assert own["NFE per prompt"] == fmean(row["nfe"] for row in winners)
    assert own["passed"] == fmean(row["score"] >= target for row in winners)
    assert any("passed" in line and "best-of-" in line for line in lines)
    assert (
        json.loads((output / "ledger.json").read_text())["nfe"]
        == sum(row["nfe"] for row in winners)
        <= 48
    )


def test_halving_is_reported_beside_best_of_n(pipeline: Path, tmp_path: Path) -> None:
    """Expected from the calibration's runs of the same prompts, paired with the winners."""
    halves = HalvingConfig(guard="mean", keep=0.5, min_kendall=-1.0, calibration_candidates=4)
    asked = config(pipeline, tmp_path / "out", algorithm="halving", halving=halves)
    output, lines = search_to_folder(asked)
    assert "Kendall's tau" in lines[1] and "calibration's whole runs" in lines[2]
    runs: dict[int, list[float]] = {0: [], 1: []}
    for row in rows(output / "calibration", "candidates.jsonl"):
        if row["goal"] == "final":
            runs[row["prompt_index"]].append(row["score"])
    winners = rows(output, "winners.jsonl")
    n = fmean(row["nfe"] for row in winners) / 4
    bests = expected_bests([runs[row["prompt_index"]] for row in winners], n)
    own, other = table_in(output)
    assert other["mean score"] == pytest.approx(fmean(bests))
    ahead = fmean(row["score"] for row in winners) - fmean(bests)
    assert other["search ahead by"].value == pytest.approx(ahead)
    assert other["search"] == f"best-of-{n:.3g}" and own["search"] == "halving"
    assert "passed" not in table_of([own]).columns


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": math.nan}, "target=nan must be a finite number"),
        ({"target": math.inf}, "target=inf must be a finite number"),
        ({"target": 0.1}, "target=0.1: no image reaches it, the highest score of dark is 0"),
        ({"target": -0.1, "algorithm": "halving"}, "use random, zero_order, draft, noise_opt"),
        ({"target": -0.1, "algorithm": "paths"}, "algorithm=paths spends most of its budget"),
    ],
)
def test_targets_that_cannot_be_are_refused(
    changes: dict[str, Any], reason: str, pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        config(pipeline, tmp_path / "out", **changes)


def test_the_reach_of_several_verifiers_is_their_weighted_sum(tmp_path: Path) -> None:
    def asked(target: float, weight: float, ensemble: Any = "weighted_sum") -> SearchConfig:
        stable = VerifierConfig(kind="stability", weight=weight)
        both = {"dark": VerifierConfig(kind="luminance", target=0.0), "stable": stable}
        more = {"verifiers": both, "ensemble": ensemble, "target": target, "held_out": {}}
        return config(tmp_path, tmp_path / "out", **more)

    assert asked(2.0, 2.0).target == 2.0
    with pytest.raises(UserError, match="the highest score of dark, stable is 2"):
        asked(2.1, 2.0)
    assert asked(9.0, -1.0).target == 9.0  # unbounded: a score of -9 counts 9
    with pytest.raises(UserError, match="ensemble=mean_rank ranks candidates among each other"):
        asked(0.5, 1.0, "mean_rank")
