"""Paths: rounds that fit a budget, and more starts with what none fits."""

import json
from pathlib import Path
from typing import Any

import pytest

from blackpoint.sampling.search.algorithms.paths import PathsConfig, level_of, paths, unspent
from blackpoint.sampling.search.problem import Problem
from tests.search_problems import runner, search


def find(folder: Path, budget: int, steps: int, config: PathsConfig) -> tuple[Any, list[Any]]:
    one = runner(1, num_steps=steps)
    [found] = search(one, folder, lambda problem: paths(problem, config), budget)
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    assert found.spent_nfe == one.ledger.nfe == sum(row["nfe"] for row in rows) <= budget
    return found, rows


def test_a_budget_that_no_round_fits_goes_into_starts(tmp_path: Path) -> None:
    """192 NFE of 24 steps: without more starts 48 are spent."""
    plain, _ = find(tmp_path / "plain", 192, 24, PathsConfig(fill=False))
    assert plain.spent_nfe == 48
    found, rows = find(tmp_path / "fill", 192, 24, PathsConfig())
    first = level_of(runner(1, num_steps=24).grid, 0.11)
    starts = [row for row in rows if row["round"] == 0]
    assert len(starts) == (192 - 2 * (24 - first)) // first > 2
    assert 192 - found.spent_nfe < first
    finals = [row for row in rows if row["goal"] == "final"]
    best = sorted(starts, key=lambda row: -row["score"])[:2]
    assert [row["parent"] for row in finals] == [row["candidate"] for row in best]
    assert found.note == f"no round fits the budget: the best of {len(starts)} starts"
    assert found.best.score >= plain.best.score


@pytest.mark.parametrize(("steps", "budget"), [(10, 160), (10, 23), (24, 768), (8, 10), (24, 250)])
def test_less_than_a_start_is_left(steps: int, budget: int, tmp_path: Path) -> None:
    one = runner(1, num_steps=steps)
    first = level_of(one.grid, 0.11)
    found, rows = find(tmp_path / "fill", budget, steps, PathsConfig())
    plain, before = find(tmp_path / "plain", budget, steps, PathsConfig(fill=False))
    assert budget - found.spent_nfe < min(max(first, 1), steps - 1) + (budget < 2 * steps) * steps
    num_rounds, left = unspent(Problem(0, 0, one.grid, one.cost, budget), PathsConfig(), 2)
    if budget >= 2 * steps:
        assert left == budget - plain.spent_nfe
        assert {row["round"] for row in rows} == set(range(num_rounds + 2))
        assert {row["round"] for row in before} == set(range(num_rounds + 2))
