"""Drafts: what they cost, which noises they choose, and where they are not made."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.search.algorithms.draft import DraftConfig, draft, looks, steps_of_drafts
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.calibration import correlation, measured_taus, read_kendall
from blackpoint.sampling.search.problem import Correlation, Problem, Seeded
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.load import VerifierConfig
from tests.search_problems import GaussianModel, runner, scores_of, search
from tests.test_search_verb import config, image_of, rows

DRAW = partial(initial_noise, shape=(1, 4, 4))


def rows_of(folder: Path, goal: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    return [row for row in found if row["goal"] == goal]


def scores_in(folder: Path) -> dict[int, float]:
    return {row["seed"]: row["score"] for row in rows_of(folder, "final")}


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("budget", "num_drafts", "num_whole"), [(160, 26, 8), (57, 9, 3)])
def test_half_of_the_budget_is_for_drafts(
    scale: float, budget: int, num_drafts: int, num_whole: int, tmp_path: Path
) -> None:
    """N = (B - m S c) / (k c): 10 steps, drafts of 3, c = 2 with guidance."""
    cost = 2 if scale > 1 else 1
    one = runner(1, guidance=Guidance(scale))
    make = lambda problem: draft(problem, DraftConfig(num_whole=num_whole))  # noqa: E731
    [found] = search(one, tmp_path, make, cost * budget)
    drafts, finals = rows_of(tmp_path, "draft"), rows_of(tmp_path, "final")
    assert len(drafts) == num_drafts and len(finals) == num_whole
    assert {(row["num_steps"], row["stop"], row["nfe"]) for row in drafts} == {(3, 3, 3 * cost)}
    assert not any("num_steps" in row for row in finals)
    assert found.spent_nfe == cost * (3 * num_drafts + 10 * num_whole) == one.ledger.nfe


def test_the_best_drafts_run_in_all_steps_and_win(tmp_path: Path) -> None:
    """A pixel of the Gaussian model rises with its noise in any number of steps, so the winner of N
    drafts is the best of N whole runs of the same seeds."""
    [found] = search(runner(1), tmp_path / "draft", lambda p: draft(p, DraftConfig()), 160)
    drafts = sorted(rows_of(tmp_path / "draft", "draft"), key=lambda row: -row["score"])
    finals = rows_of(tmp_path / "draft", "final")
    assert [row["parent"] for row in finals] == [row["candidate"] for row in drafts[: len(finals)]]
    assert [row["seed"] for row in finals] == [row["seed"] for row in drafts[: len(finals)]]
    [whole] = search(
        runner(1),
        tmp_path / "random",
        lambda problem: random_search(problem, RandomSearchConfig()),
        10 * len(drafts),
    )
    assert found.best is not None and whole.best is not None
    assert (found.best.trial.seed, found.best.score) == (whole.best.trial.seed, whole.best.score)
    assert found.best.trial.goal == "final"


def test_a_draft_is_a_run_on_its_own_grid(tmp_path: Path) -> None:
    search(runner(1), tmp_path / "draft", lambda p: draft(p, DraftConfig(draft_steps=4)), 160)
    make = lambda problem: random_search(problem, RandomSearchConfig())  # noqa: E731
    search(runner(1, num_steps=4), tmp_path / "short", make, 4 * 20)
    short, drafts = scores_in(tmp_path / "short"), rows_of(tmp_path / "draft", "draft")
    assert len(drafts) == 20 and {row["seed"]: row["score"] for row in drafts} == short


def test_neighbours_are_of_the_best_four_drafts(tmp_path: Path) -> None:
    make = lambda problem: draft(problem, DraftConfig(share_new=0.5))  # noqa: E731
    [found] = search(runner(1), tmp_path, make, 160)
    drafts = rows_of(tmp_path, "draft")
    new = [row for row in drafts if row["parent"] is None]
    assert len(new) == 13 and len(drafts) == 26 and {row["round"] for row in drafts} == {0, 1}
    best = sorted(new, key=lambda row: -row["score"])[:4]
    assert {row["parent"] for row in drafts[13:]} == {row["candidate"] for row in best}
    origins = {row["candidate"]: Seeded(row["seed"]).noise(DRAW).flatten() for row in new}
    for outcome in found.finals:
        start = outcome.trial.start
        if not isinstance(start, Seeded):
            [parent] = [row["parent"] for row in drafts if row["seed"] == outcome.trial.seed]
            noise = start.noise(DRAW).flatten()  # type: ignore[union-attr]
            cosine = torch.cosine_similarity(noise, origins[parent], dim=0)
            assert_close(cosine, torch.tensor(0.9), rtol=1e-5, atol=0)


def test_the_steps_of_a_draft_are_the_fewest_of_a_good_correlation() -> None:
    free = DraftConfig()
    assert looks(free, 24) == [2, 3, 4, 6] and looks(free, 50) == [4, 6, 8, 12]
    assert looks(free, 4) == [2] and looks(DraftConfig(draft_steps=5), 24) == [5]

    def chosen(*taus: tuple[float, float], config: DraftConfig = free) -> int | None:
        steps = looks(config, 24)
        kendall = {k: Correlation(*tau) for k, tau in zip(steps, taus, strict=False)}
        return steps_of_drafts(config, 24, kendall)

    assert chosen((0.54, 0.45), (0.71, 0.6), (0.79, 0.7), (0.9, 0.8)) == 3
    assert chosen((0.3, 0.21), (0.4, 0.3), (0.5, 0.4), (0.55, 0.4)) == 6
    assert chosen((0.9, 0.19), (0.4, 0.3), (0.5, 0.1), (0.59, 0.1)) == 3
    assert chosen((0.3, 0.1), (0.3, 0.1), (0.4, 0.19), (0.4, -1.0)) is None
    assert chosen((0.3, 0.1), config=DraftConfig(draft_steps=5)) is None
    assert chosen((0.3, 0.2), config=DraftConfig(draft_steps=5)) == 5
    assert chosen() is None
    assert steps_of_drafts(free, 24, None) == 3 and steps_of_drafts(free, 50, None) == 6


def test_drafts_that_rank_badly_or_cost_too_much_are_best_of_n(tmp_path: Path) -> None:
    one = runner(1)
    problem = Problem(0, 0, one.grid, one.cost, 160)
    best_of_n = next(random_search(problem, RandomSearchConfig()))
    assert next(draft(replace(problem, kendall={}), DraftConfig())) == best_of_n
    make = lambda problem: draft(replace(problem, kendall={}), DraftConfig())  # noqa: E731
    [found] = search(one, tmp_path / "blind", make, 160)
    assert found.note == "best-of-N: drafts do not tell how whole runs will rank"
    make = lambda problem: draft(problem, DraftConfig(num_whole=13))  # noqa: E731
    [found] = search(one, tmp_path / "dear", make, 160)
    assert found.note == "best-of-N: the budget pays for no more than 13 drafts of 3 steps"
    assert found.spent_nfe == 160 and len(found.finals) == 16


def test_the_lower_bound_is_students() -> None:
    """t of .95 with 3 degrees of freedom is 2.353; a single prompt has no bound."""
    found = correlation([0.2, 0.4, 0.6, 0.8])
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5 - 2.3534 * 0.258199 / 2, abs=1e-4)
    assert correlation([0.7]) == (0.7, -1.0)


def test_the_calibration_drafts_every_noise_in_all_numbers_of_steps(tmp_path: Path) -> None:
    from blackpoint.sampling.search.algorithms.draft import walk

    model = GaussianModel()
    one = runner(2, model)
    search(one, tmp_path, lambda problem: walk(problem, [2, 3], 6), 6 * (2 + 3 + 10))
    assert model.rows == one.ledger.nfe == 2 * 6 * (2 + 3 + 10)
    found = [json.loads(line) for line in (tmp_path / "candidates.jsonl").open()]
    taus = measured_taus(found, scores_of)
    assert {look: (len(each), min(each)) for look, each in taus.items()} == {
        2: (2, pytest.approx(1.0)),
        3: (2, pytest.approx(1.0)),
    }
    seeds = [{row["seed"] for row in found if row["stop"] == stop} for stop in (2, 3, 10)]
    assert seeds[0] == seeds[1] == seeds[2]


def test_a_winner_of_drafts_is_made_again_from_its_seed(pipeline: Path, tmp_path: Path) -> None:
    asked = config(
        pipeline,
        tmp_path / "out",
        algorithm="draft",
        draft=DraftConfig(min_kendall=-1.0, calibration_candidates=3),
        held_out={},
    )
    output, lines = search_to_folder(asked)
    kendall = read_kendall(output)
    assert set(kendall) == {2} and "drafts of 2 steps" in lines[1]
    model = DiffusionModel.load(pipeline)
    for row in rows(output, "winners.jsonl"):
        again = model.sample(
            row["prompt"], seeds=[row["seed"]], num_steps=4, guidance_scale=1.0, batch_size=1
        )[0]
        assert_close(image_of(output, row), again, rtol=0, atol=0.6 / 255)
    ledger = json.loads((output / "ledger.json").read_text())
    candidates = rows(output, "candidates.jsonl")
    assert ledger["nfe"] == sum(row["nfe"] for row in candidates) == 2 * 24
    assert ledger["beside"]["nfe"] == 2 * 3 * (2 + 4)
    again, _ = search_to_folder(asked)
    assert rows(again, "candidates.jsonl") == candidates


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_steps": 1}, "num_steps=1: algorithm=draft .* at least 4"),
        ({"eta": 0.5}, "sampler=ddim, eta=0.5: the noise of the steps makes another image"),
        ({"sampler": "euler_ancestral"}, "sampler=euler_ancestral, eta=None"),
        ({"draft": DraftConfig(draft_steps=4)}, "draft_steps=4 must be less than num_steps=4"),
        (
            {"verifiers": {"seen": VerifierConfig(kind="self_supervised", checkpoint="features")}},
            "needs whole runs; algorithm=draft has none",
        ),
    ],
)
def test_drafts_that_cannot_be_are_refused(
    changes: dict[str, Any], reason: str, pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        config(pipeline, tmp_path / "out", algorithm="draft", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong", [{"num_whole": 1}, {"draft_steps": 0}, {"share_new": 0.0}, {"min_kendall": 2.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"draft.{next(iter(wrong))}="):
        DraftConfig(**wrong)
