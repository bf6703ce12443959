"""Searches against closed forms, exact budgets, and searches that are killed and resumed."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.testing import assert_close

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.noise import initial_noise, seeded_noise
from blackpoint.sampling.search.algorithms.draft import DraftConfig, draft
from blackpoint.sampling.search.algorithms.fk_steering import (
    FkSteeringConfig,
    fk_steering,
    systematic,
)
from blackpoint.sampling.search.algorithms.halving import (
    HalvingConfig,
    halving,
    walk,
)
from blackpoint.sampling.search.algorithms.paths import PathsConfig, paths
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.algorithms.zero_order import ZeroOrderConfig, zero_order
from blackpoint.sampling.search.calibration import measured_taus
from blackpoint.sampling.search.problem import Correlation, Neighbour, Problem, Search, Seeded
from tests.search_problems import SHAPE, GaussianModel, linear, pixel_law, runner, scores_of, search


def best_of(problem: Problem) -> Search:
    return random_search(problem, RandomSearchConfig())


def two_neighbours(problem: Problem) -> Search:
    return zero_order(problem, ZeroOrderConfig())


def two_paths(problem: Problem) -> Search:
    return paths(problem, PathsConfig())


def halves(problem: Problem) -> Search:
    return halving(problem, HalvingConfig())


def drafts(problem: Problem) -> Search:
    return draft(problem, DraftConfig(share_new=0.6))


def particles(problem: Problem) -> Search:
    return fk_steering(problem, FkSteeringConfig(resample_every_steps=3))


ALGORITHMS = {
    "random": (best_of, {}),
    "zero_order": (two_neighbours, {}),
    "paths": (two_paths, {}),
    "halving": (halves, {}),
    "draft": (drafts, {}),
    "fk": (particles, {"sampler": "euler_ancestral"}),
}
GRID = np.linspace(-6, 6, 241)
LARGER_OF_TWO = 2 * stats.norm.pdf(GRID) * stats.norm.cdf(GRID)  # density of the larger of two
EACH = pytest.mark.parametrize("name", ALGORITHMS)


def expected_maximum(n: int) -> float:
    """E[max of n standard normals]."""
    density = lambda z: z * n * stats.norm.pdf(z) * stats.norm.cdf(z) ** (n - 1)  # noqa: E731
    return integrate.quad(density, -10, 10)[0]


@pytest.mark.slow
def test_best_of_n_gains_what_the_largest_of_n_normals_is(tmp_path: Path) -> None:
    one = runner(600)
    mean, spread = pixel_law(one)
    scores = [
        each.best.score for each in search(one, tmp_path, best_of, 8 * 10) if each.best is not None
    ]
    error = np.std(scores) / len(scores) ** 0.5
    assert len(scores) == 600
    assert abs(np.mean(scores) - (mean + spread * expected_maximum(8))) < 4 * error


def test_a_zero_order_round_gains_what_its_geometry_says(tmp_path: Path) -> None:
    """One round of N = 2 from the pivot's own score, by integration over the neighbours'."""
    shape = (1, 12, 12)
    one = runner(400, GaussianModel(shape))
    mean, spread = pixel_law(one)
    found = search(one, tmp_path, two_neighbours, 3 * 10)
    cosine, sine = 0.95, math.sqrt(1 - 0.95**2)
    gains, expected = [], []
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").open()]
    first = {row["prompt_index"]: row for row in rows if row["candidate"] == 0}
    for each in found:
        assert each.best is not None
        row = first[each.problem.prompt_index]
        noise = seeded_noise(row["seed"], shape).double()
        start, norm = noise[0, 0, 0].item(), noise.norm().item()
        # w is uniform on the sphere across u: its part along a pixel has this deviation.
        across = math.sqrt(max(0.0, 1 - (start / norm) ** 2) / (noise.numel() - 1))
        scale = sine * norm * across

        gain = np.maximum(0.0, (cosine - 1) * start + scale * GRID)
        expected.append(spread * np.trapezoid(gain * LARGER_OF_TWO, GRID))
        gains.append(each.best.score - row["score"])
        assert row["score"] == pytest.approx(mean + spread * start, abs=2e-4)
    error = np.std(np.subtract(gains, expected)) / len(gains) ** 0.5
    assert abs(np.mean(gains) - np.mean(expected)) < 4 * error


def test_a_neighbour_keeps_the_norm_and_has_the_cosine() -> None:
    pivot = Seeded(3)
    near = Neighbour(Neighbour(pivot, 4, 0.95), 5, 0.8)
    draw = partial(initial_noise, shape=(4, 8, 8))
    x, y = near.parent.noise(draw).flatten(), near.noise(draw).flatten()
    assert_close(y.norm(), pivot.noise(draw).norm(), rtol=1e-5, atol=0)
    assert_close(torch.cosine_similarity(x, y, dim=0), torch.tensor(0.8), rtol=1e-5, atol=0)


@EACH
@pytest.mark.parametrize("budget", [20, 57, 160])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_budget_is_kept_and_the_ledger_counts_what_the_network_did(
    name: str, budget: int, scale: float, tmp_path: Path
) -> None:
    make, settings = ALGORITHMS[name]
    model = GaussianModel()
    guidance = Guidance(scale)
    one = runner(3, model, guidance=guidance, **settings)
    found = search(one, tmp_path, make, budget)
    assert one.ledger.nfe == model.rows and one.ledger.decoded_images == model.decoded
    assert one.ledger.unconditional_rows == (model.rows // 2 if scale > 1 else 0)
    assert sum(each.spent_nfe for each in found) == model.rows
    for each in found:
        assert 0 < each.spent_nfe <= budget and each.best is not None


@EACH
def test_the_winner_is_the_best_final_candidate_in_any_batch(name: str, tmp_path: Path) -> None:
    make, settings = ALGORITHMS[name]
    winners = []
    for batch_size in (1, 5, 64):
        folder = tmp_path / str(batch_size)
        found = search(runner(3, batch_size=batch_size, **settings), folder, make, 160)
        rows = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
        for each in found:
            index = each.problem.prompt_index
            finals = [r for r in rows if r["prompt_index"] == index and r["goal"] == "final"]
            best = max(finals, key=lambda row: (row["score"], -row["candidate"]))
            assert each.best is not None
            assert each.best.trial.candidate == best["candidate"]
        winners.append([each.best.trial for each in found if each.best is not None])
        assert not list((folder / "states").glob("*")), "states are for open prompts alone"
    numbers = [[(trial.candidate, trial.seed) for trial in each] for each in winners]
    assert numbers[0] == numbers[1] == numbers[2]


@EACH
@pytest.mark.parametrize("when", [1, 4, 9])
def test_a_killed_search_pays_nothing_twice_and_finds_the_same(
    name: str, when: int, tmp_path: Path
) -> None:
    make, settings = ALGORITHMS[name]
    whole = search(runner(2, **settings), tmp_path / "whole", make, 160)

    class Killed(Exception):
        pass

    calls = 0

    def killing(images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > when:
            raise Killed
        return linear(images, prompts)

    folder, model = tmp_path / "broken", GaussianModel()
    with pytest.raises(Killed):
        search(runner(2, model, batch_size=3, verifier=killing, **settings), folder, make, 160)
    with (folder / "candidates.jsonl").open("a") as file:
        file.write('{"prompt_index": 0, "candi')  # torn by the kill
    before = len((folder / "candidates.jsonl").read_text().splitlines()) - 1
    again = GaussianModel()
    resumed = search(runner(2, again, batch_size=3, **settings), folder, make, 160)
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    keys = [(row["prompt_index"], row["candidate"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert again.rows == sum(row["nfe"] for row in rows[before:])
    assert [each.best and each.best.trial.candidate for each in resumed] == [
        each.best and each.best.trial.candidate for each in whole
    ]
    assert [each.best and each.best.score for each in resumed] == pytest.approx(
        [each.best and each.best.score for each in whole], abs=1e-4
    )


def test_scores_that_are_not_finite_never_win(tmp_path: Path) -> None:
    def broken(images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
        scores = linear(images, prompts)
        return torch.where(scores > 0.8, torch.nan, scores)

    [found] = search(runner(1, verifier=broken), tmp_path / "some", best_of, 160)
    assert found.num_rejected > 0 and found.best is not None and found.best.score <= 0.8

    def endless(images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
        scores = linear(images, prompts)
        return torch.where(scores > 0.8, torch.inf, scores)

    [found] = search(runner(1, verifier=endless), tmp_path / "inf", best_of, 160)
    assert found.num_rejected > 0 and found.best is not None and found.best.score <= 0.8
    [again] = search(runner(1, verifier=endless), tmp_path / "inf", best_of, 160)
    assert again.best is not None and again.best.trial.candidate == found.best.trial.candidate

    def hopeless(images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
        return torch.full((len(images),), torch.nan)

    with pytest.raises(RunFailed, match="none of its 16 candidates has a finite score"):
        search(runner(1, verifier=hopeless), tmp_path / "none", best_of, 160)


def test_halving_starts_more_noises_than_best_of_n_and_prunes_only_where_it_may() -> None:
    one = runner(1)
    problem = Problem(0, 0, one.grid, one.cost, 160)
    assert len(next(halving(problem, HalvingConfig()))) > 160 // 10
    measured = {level: Correlation(tau, tau) for level, tau in {2: 0.1, 5: 0.6, 8: 0.2}.items()}
    config = HalvingConfig(levels=[0.2, 0.5, 0.8])
    first = next(halving(replace(problem, kendall=measured), config))
    assert {trial.stop for trial in first} == {5}
    blind = next(halving(replace(problem, kendall={}), config))
    assert {trial.stop for trial in blind} == {10} and len(blind) == 16


def test_the_rank_correlation_is_measured_on_whole_runs(tmp_path: Path) -> None:
    """The ideal denoiser's preview of a pixel rises with its end, so every level tells it all."""
    search(runner(2), tmp_path, lambda problem: walk(problem, {3: 1.0, 7: 1.0}, 6), 60)
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").open()]
    assert len(rows) == 2 * 6 * 3
    taus = measured_taus(rows, scores_of)
    assert {look: len(each) for look, each in taus.items()} == {3: 2, 7: 2}
    assert min(map(min, taus.values())) == pytest.approx(1.0)
    for row in rows:
        row["score"] = row["candidate"] % 3 if row["goal"] == "final" else 0.0
    assert measured_taus(rows, scores_of) == {}


def test_a_budget_below_one_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="budget_nfe=9 is smaller than one image, which takes 10"):
        search(runner(1), tmp_path, best_of, 9)


def test_systematic_resampling_keeps_expected_counts() -> None:
    weights = [0.5, 0.25, 0.125, 0.125]
    draws = [systematic(weights, (u + 0.5) / 64) for u in range(64)]
    counts = np.bincount(np.concatenate(draws), minlength=4) / 64
    np.testing.assert_allclose(counts, 4 * np.array(weights), atol=0.07)
    for parents in draws:
        got = np.bincount(parents, minlength=4)
        assert (np.abs(got - 4 * np.array(weights)) < 1).all() and parents == sorted(parents)


@pytest.mark.slow
def test_steering_tilts_a_gaussian(tmp_path: Path) -> None:
    """exp(lambda x) moves the mean of N(m, s^2) by lambda s^2 and leaves its spread."""
    strength, count = 1.5, 200
    config = FkSteeringConfig(strength=strength, resample_every_steps=2, ess_threshold=1.0)
    settings: dict[str, Any] = {"sampler": "euler_ancestral", "num_steps": 20}
    scores = {}
    for tilt in (0.0, strength):
        own = FkSteeringConfig(**(vars(config) | {"strength": tilt}))
        one = runner(1, GaussianModel((1, 1, 1)), batch_size=count, **settings)
        search(one, tmp_path / str(tilt), lambda p, own=own: fk_steering(p, own), 20 * count)
        rows = [json.loads(line) for line in (tmp_path / str(tilt) / "candidates.jsonl").open()]
        scores[tilt] = np.array([row["score"] for row in rows if row["goal"] == "final"])
    plain, tilted = scores[0.0], scores[strength]
    error = 3 * plain.std() / count**0.5  # resampled particles are not independent
    assert abs(tilted.mean() - plain.mean() - strength * plain.var()) < 4 * error
    assert tilted.std() == pytest.approx(plain.std(), rel=0.15)


def test_a_record_of_another_search_is_refused(tmp_path: Path) -> None:
    search(runner(1), tmp_path, best_of, 40)
    with pytest.raises(UserError, match="belongs to a search with other settings"):
        search(
            runner(1),
            tmp_path,
            lambda problem: random_search(problem, RandomSearchConfig(first_seed=7)),
            40,
        )


def test_a_line_that_no_kill_has_torn_is_refused(tmp_path: Path) -> None:
    search(runner(1), tmp_path, best_of, 40)
    path = tmp_path / "candidates.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{\n" + "".join(lines[1:]))
    with pytest.raises(UserError, match="candidates.jsonl:2 is not JSON"):
        search(runner(1), tmp_path, best_of, 40)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ZeroOrderConfig(num_neighbours=0), "num_neighbours=0"),
        (lambda: ZeroOrderConfig(cosine=1.0), "cosine=1.0"),
        (lambda: PathsConfig(delta_f=0.9), "each round must gain"),
        (lambda: PathsConfig(num_paths=0), "num_paths"),
        (lambda: PathsConfig(sigma=1.0), "sigma=1.0"),
        (lambda: HalvingConfig(levels=[0.5, 0.5]), "levels="),
        (lambda: HalvingConfig(keep=1.0), "keep=1.0"),
        (lambda: HalvingConfig(min_kendall=2.0), "min_kendall=2.0"),
        (lambda: FkSteeringConfig(resample_every_steps=0), "resample_every_steps=0"),
        (lambda: FkSteeringConfig(ess_threshold=2.0), "ess_threshold=2.0"),
        (lambda: FkSteeringConfig(tempering=-1.0), "tempering"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make()


def test_shapes_are_those_of_the_model() -> None:
    assert GaussianModel().noise([0]).shape == (1, *SHAPE)
