"""What a score that is not finite does to a search: nothing but lose, in every algorithm."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blackpoint.data.files.plain import number, recorded
from blackpoint.sampling.grid import SamplingGrid
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.search.algorithms.draft import DraftConfig, draft
from blackpoint.sampling.search.algorithms.fk_steering import FkSteeringConfig, fk_steering
from blackpoint.sampling.search.algorithms.halving import HalvingConfig, halving, walk
from blackpoint.sampling.search.algorithms.noise_optimisation import (
    NoiseOptimisationConfig,
    noise_optimisation,
)
from blackpoint.sampling.search.algorithms.paths import PathsConfig, paths
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.algorithms.zero_order import ZeroOrderConfig, zero_order
from blackpoint.sampling.search.calibration import correlation, measured_taus
from blackpoint.sampling.search.driver import PromptSearch
from blackpoint.sampling.search.judge import alarms, judge
from blackpoint.sampling.search.problem import Outcome, Problem, Search, Seeded, Trial
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.statistics.frechet import Gaussian
from blackpoint.sampling.verifiers.ensemble import combined
from blackpoint.sampling.verifiers.load import ImageModelConfig
from blackpoint.sampling.verifiers.oracle import Oracle, OracleConfig
from tests.search_problems import GaussianModel, Scored, linear, runner, scores_of, search
from tests.toy_denoisers import ZERO_SNR, noise_of, reader

WORST = -1e6
"""A finite score that no image reaches: what one that is not finite has to be worth."""
BAD = [math.nan, math.inf, -math.inf]
Make = Callable[[Problem], Search]


def steering(**settings: Any) -> Make:
    config = FkSteeringConfig(resample_every_steps=2, **settings)
    return lambda problem: fk_steering(problem, config)


ALGORITHMS: dict[str, tuple[Make, dict[str, Any]]] = {
    "random": (lambda problem: random_search(problem, RandomSearchConfig()), {}),
    "zero_order": (lambda problem: zero_order(problem, ZeroOrderConfig()), {}),
    "paths": (lambda problem: paths(problem, PathsConfig(3, 2)), {}),
    "halving": (lambda problem: halving(problem, HalvingConfig()), {}),
    "draft": (lambda problem: draft(problem, DraftConfig()), {}),
} | {
    f"fk_steering {potential} {threshold}": (
        steering(potential=potential, ess_threshold=threshold),
        {"sampler": "euler_ancestral"},
    )
    for potential in ("difference", "max", "sum")
    for threshold in (0.5, 1.0)
}


class Breaking:
    """Scores like `linear`; gives the calls whose number is in `chosen` the score `value`.

    With batches of one, a call is a candidate, counted in the order of running.
    """

    def __init__(self, chosen: Callable[[int], bool], value: float) -> None:
        self.chosen, self.value, self.calls = chosen, value, 0

    def __call__(self, images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
        assert len(images) == 1
        self.calls += 1
        scores = linear(images, prompts)
        return torch.full_like(scores, self.value) if self.chosen(self.calls - 1) else scores


def broken_search(
    name: str, folder: Path, value: float, chosen: Callable[[int], bool]
) -> tuple[PromptSearch, list[dict[str, Any]]]:
    make, settings = ALGORITHMS[name]
    one = runner(1, batch_size=1, verifier=Breaking(chosen, value), **settings)
    [found] = search(one, folder, make, 160)
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    return found, rows


CHOSEN: dict[str, Callable[[int], bool]] = {
    "first": lambda call: call == 0,
    "fourth": lambda call: call == 3,
    "every third": lambda call: call % 3 == 0,
    "all but every fifth": lambda call: call % 5 != 4,
    "the first fifteen": lambda call: call < 15,
}
KEYS = ("candidate", "parent", "seed", "goal", "stop", "round")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("which", CHOSEN)
def test_a_score_that_is_not_finite_loses_and_moves_no_other(
    name: str, which: str, tmp_path: Path
) -> None:
    """The course of the search is that of the worst finite score in its place.

    Not so with potential=max, which would let a particle keep the best that it had before.
    """
    _, expected = broken_search(name, tmp_path / "worst", WORST, CHOSEN[which])
    for value in BAD:
        found, rows = broken_search(name, tmp_path / str(value), value, CHOSEN[which])
        for place, row in enumerate(rows):
            said, is_broken = number(row["scores"]["linear"]), CHOSEN[which](place)
            assert (row["score"] is None) == is_broken
            assert str(said) == str(value) if is_broken else round(said, 4) == row["score"]
        if "max" not in name:
            assert [[row[key] for key in (*KEYS, "score")] for row in rows] == [
                [row[key] for key in KEYS] + [None if row["score"] == WORST else row["score"]]
                for row in expected
            ]
        finals = [r for r in rows if r["goal"] == "final" and r["score"] is not None]
        assert found.num_rejected == sum(row["score"] is None for row in rows)
        best = max(finals, key=lambda row: (row["score"], -row["candidate"]))
        assert found.best is not None
        assert found.best.trial.candidate == best["candidate"]
        assert math.isfinite(found.best.score)


@pytest.mark.parametrize("value", BAD)
def test_a_resumed_search_reads_what_is_not_finite_as_it_was(value: float, tmp_path: Path) -> None:
    whole, _ = broken_search("zero_order", tmp_path, value, CHOSEN["every third"])
    for line in (tmp_path / "candidates.jsonl").open():
        json.loads(line, parse_constant=pytest.fail)  # a reader of strict JSON takes it
    model = GaussianModel()
    again = runner(1, model, batch_size=1)
    [resumed] = search(again, tmp_path, ALGORITHMS["zero_order"][0], 160)
    assert model.rows == 0 and resumed.best is not None and whole.best is not None
    assert resumed.best.trial.candidate == whole.best.trial.candidate
    assert resumed.num_rejected == whole.num_rejected == 6


def steer(looks: list[list[float]], **settings: Any) -> list[Trial]:
    """Walks as many particles as a look has scores; returns the trials that follow the last."""
    one = runner(1, sampler="euler_ancestral")
    budget = 10 * len(looks[0])
    algorithm = steering(**settings)(Problem(0, 0, one.grid, one.cost, budget))
    trials = next(algorithm)
    for scores in looks:
        results = [result for _, result in one.run([(0, trial) for trial in trials])]
        trials = algorithm.send(
            [replace(r.outcome, score=s) for r, s in zip(results, scores, strict=True)]
        )
    return trials


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("value", BAD)
def test_a_look_resamples_after_one_that_broke_a_particle(potential: str, value: float) -> None:
    """At the second look one particle leads by 20 nats, so all descend from it."""
    trials = steer([[value, 0, 0, 0], [0, 5, 0, 0]], potential=potential)
    assert [trial.parent for trial in trials] == [5] * 4
    trials = steer([[value, 0, 0, 0], [5, 0, 0, 0], [0, 0, 5, 0]], potential=potential)
    assert [trial.parent for trial in trials] == [10] * 4


@pytest.mark.parametrize("value", BAD)
def test_a_difference_has_telescoped_past_a_broken_look(value: float) -> None:
    trials = steer([[value, 0, 0, 0], [5, 0, 0, 0]], potential="difference")
    assert [trial.parent for trial in trials] == [4] * 4


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("value", BAD)
def test_particles_that_break_one_after_the_other_all_reach_the_end(
    potential: str, value: float
) -> None:
    """Without a resampling between, one look breaks the one and the next look the other."""
    looks = [[value, 0.5], [0.5, value]] * 2
    trials = steer(looks, potential=potential, ess_threshold=0.0)
    assert [(trial.goal, trial.parent) for trial in trials] == [("final", 6), ("final", 7)]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_ascent_ends_where_its_score_breaks_and_leaves_other_prompts_alone(
    value: float, step: int, tmp_path: Path
) -> None:
    """Two prompts share each batch; the score of the first breaks in one step."""

    class Differentiable(GaussianModel):
        def decode_with_gradient(self, latents: Tensor) -> Tensor:
            return latents

    class Verifier(Scored):
        differentiable = True

    def ascents(folder: Path, broken: float | None) -> tuple[list[PromptSearch], list[Any]]:
        calls = 0

        def score(images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
            nonlocal calls
            scores = images.flatten(1).mean(dim=1)
            calls += 1
            if broken is not None and calls == step + 1:
                scores = scores + torch.tensor([broken, 0.0])
            return scores

        plain = runner(2)
        model: Any = Differentiable()
        verifiers = [Verifier(score)]
        one = TrialRunner(model, plain.prompts, plain.sampling, verifiers, {"linear": 1.0}, 8)
        price = one.gradient_cost()

        def make(problem: Problem) -> Search:
            own = replace(problem, gradient_cost=price)
            return noise_optimisation(own, NoiseOptimisationConfig())

        found = search(one, folder, make, 5 * price, needs_winner=False)
        return found, [json.loads(line) for line in (folder / "candidates.jsonl").open()]

    plain, expected = ascents(tmp_path / "plain", None)
    broken, rows = ascents(tmp_path / "broken", value)
    first, other = ([row for row in rows if row["prompt_index"] == index] for index in (0, 1))
    assert len(first) == step + 1 and broken[0].note.startswith(f"stopped after {step + 1} steps")
    assert first[-1]["score"] is None and str(number(first[-1]["scores"]["linear"])) == str(value)
    assert broken[0].num_rejected == 1
    assert (broken[0].best is None) == (step == 0)
    assert [row["score"] for row in other] == [
        row["score"] for row in expected if row["prompt_index"] == 1
    ]
    assert broken[1].best is not None and plain[1].best is not None
    assert broken[1].best.score == plain[1].best.score


@pytest.mark.parametrize("value", BAD)
def test_the_rank_correlation_is_that_of_the_finite_pairs(value: float, tmp_path: Path) -> None:
    """The ideal denoiser's previews tell the end, so what is left has the correlation 1."""
    verifier = Breaking(lambda call: call in (1, 7, 14), value)
    one = runner(1, batch_size=1, verifier=verifier)
    search(one, tmp_path, lambda problem: walk(problem, {3: 1.0, 7: 1.0}, 6), 60)
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").open()]
    assert sum(row["score"] is None for row in rows) == 3
    taus = measured_taus(rows, scores_of)
    assert {look: correlation(each).value for look, each in taus.items()} == pytest.approx(
        {3: 1.0, 7: 1.0}
    )


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("rule", ["mean_rank", "z_score", "minimum", "weighted_sum"])
def test_an_ensemble_ranks_the_finite_as_if_they_were_alone(value: float, rule: Any) -> None:
    scores = torch.tensor([[0.1, 5.0], [0.4, 1.0], [0.9, 2.0], [0.3, 4.0]]).double()
    broken = torch.cat([scores[:2], torch.tensor([[value, 100.0]]).double(), scores[2:]])
    found = combined(broken, rule)
    assert found[2] == -torch.inf
    assert torch.equal(found[[0, 1, 3, 4]], combined(scores, rule))


@pytest.mark.parametrize("value", BAD)
def test_a_ranking_that_is_not_finite_puts_its_candidate_last(value: float) -> None:
    values = [0.2, value, 0.7, value, 0.5]
    one = runner(1)
    trials = [Trial(0, number, Seeded(number), 10, "final", number) for number in range(5)]
    outcomes = [Outcome(trial, 1.0, 1) for trial in trials]
    problem = Problem(0, 0, one.grid, one.cost, 10, lambda _: values)
    order = [each.trial.candidate for each in problem.best_first(outcomes)]
    assert order == [2, 4, 0, 1, 3]
    by_score = Problem(0, 0, one.grid, one.cost, 10)
    broken = [Outcome(trial, score, 1) for trial, score in zip(trials, values, strict=True)]
    assert [each.trial.candidate for each in by_score.best_first(broken)] == [2, 4, 0, 1, 3]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("metric", ["fid", "is"])
def test_an_oracle_scores_the_others_where_one_image_has_no_features(
    value: float, metric: str
) -> None:
    reference = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    model: Any = lambda images: images.mean(dim=(2, 3))  # noqa: E731
    oracle = Oracle(model, reference if metric == "fid" else None, OracleConfig("oracle"))
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    oracle.keep(images[4])
    expected = oracle.score(images[:4], [""] * 4)
    broken = images[:4].clone()
    broken[1, 0, 2, 2] = value
    found = oracle.score(broken, [""] * 4)
    assert found[1].isnan()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("method", ["ddim", "fixed_point", "anderson", "renoise"])
def test_the_inversion_of_a_broken_run_leaves_the_others_alone(value: float, method: Any) -> None:
    grid = SamplingGrid.of(ZERO_SNR, ZERO_SNR.trailing_timesteps(4))
    x = noise_of(3)
    inverter = Inverter(method, num_iterations=3)
    expected = invert(reader(ZERO_SNR), grid, x, inverter).x
    broken = x.clone()
    broken[1] = value
    found = invert(reader(ZERO_SNR), grid, broken, inverter).x
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not found[1].isfinite().all()


def row(winner: float | str, plain: float | str, index: int, folder: Path) -> dict[str, Any]:
    from PIL import Image

    names = [f"{index}.{kind}.png" for kind in ("winner", "plain")]
    for place, name in enumerate(names):
        Image.new("RGB", (8, 8), (20 * index, 40 * place, 0)).save(folder / name)
    return {
        "scores": {"searched": 1.0 + index % 3},
        "held_out": {"judge": winner},
        "image": names[0],
        "baseline": {
            "scores": {"searched": 0.1 * index},
            "held_out": {"judge": plain},
            "image": names[1],
        },
    }


@pytest.mark.parametrize("value", BAD)
def test_the_judge_records_what_is_not_finite_and_leaves_its_prompt_out(
    value: float, tmp_path: Path
) -> None:
    def score(images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
        return torch.tensor([value, 0.25]).double()

    judges: dict[str, Any] = {"judge": Scored(score)}
    judged = judge(judges, [torch.zeros(3, 8, 8)] * 2, "a prompt")
    assert judged == [recorded({"judge": value}), {"judge": 0.25}]
    rows = [row(0.5 - 0.01 * index, 0.9, index, tmp_path) for index in range(8)]
    [expected] = alarms(rows, ImageModelConfig(), tmp_path)
    rows.insert(3, row(judged[0]["judge"], 0.9, 9, tmp_path))
    [found] = alarms(rows, ImageModelConfig(), tmp_path)
    assert found.changes["judge"] == expected.changes["judge"]
    assert found.raised and found.changes["searched"].n == 9
    rows[3]["held_out"]["judge"] = None  # as older searches have recorded it
    [old] = alarms(rows, ImageModelConfig(), tmp_path)
    assert old.changes["judge"] == expected.changes["judge"]


def features_without_the_reddest(images: Tensor) -> Tensor:
    """Gives images of one red the features NaN."""
    rows = images.mean(dim=(2, 3))
    return torch.where((rows[:, :1] * 255).round() == 180, torch.nan, rows)


def test_an_image_without_finite_features_is_left_out_of_the_diversity(tmp_path: Path) -> None:
    config = ImageModelConfig(module=f"{__name__}:features_without_the_reddest")
    rows = [row(0.5, 0.9, index, tmp_path) for index in range(8)]
    [expected] = alarms(rows, config, tmp_path)
    rows.insert(3, row(0.5, 0.9, 9, tmp_path))
    [found] = alarms(rows, config, tmp_path)
    assert found.changes["diversity"] == expected.changes["diversity"]
    assert found.changes["searched"].n == 9
