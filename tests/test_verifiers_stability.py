"""Stability as a verifier: what it scores, what it costs, and where it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.noise import seeded_noise
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.algorithms.halving import HalvingConfig, halving
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.algorithms.zero_order import ZeroOrderConfig, zero_order
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.sampling.verifiers.stability import Stability
from blackpoint.sampling.verifiers.verifier import TrajectoryVerifier, of_images
from tests.search_problems import GaussianModel, Scored, search
from tests.toy_denoisers import ZERO_SNR, reader

ALGORITHMS = {
    "random": lambda problem: random_search(problem, RandomSearchConfig()),
    "zero_order": lambda problem: zero_order(problem, ZeroOrderConfig()),
    "halving": lambda problem: halving(problem, HalvingConfig()),
}


class Toy(GaussianModel):
    """A nonlinear denoiser, whose noises are not all alike."""

    def denoiser(self, condition: Any, empty: Any, guidance: Guidance) -> Any:
        toy = reader(self.process.schedule)

        def denoise(x: torch.Tensor, t: int) -> Any:
            self.rows += len(x) * (2 if guidance.is_on(t) else 1)
            return toy(x, t)

        return denoise


def runner_of(verifier: Any, model: GaussianModel, scale: float = 1.0) -> TrialRunner:
    settings = SamplingOptions(num_steps=8, guidance_scale=scale, guidance_rescale=0.0)
    prompts = {0: "a", 1: "b"}
    return TrialRunner(model, prompts, settings, [verifier], {verifier.name: 1.0}, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("method", ["ddim", "fixed_point", "anderson", "renoise"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.0), (3.0, 3.0)], ids=str)
def test_the_ledger_counts_inversions_and_keeps_the_budget(
    algorithm: str, method: Any, scales: tuple[float, float], tmp_path: Path
) -> None:
    model = Toy()
    verifier = Stability(Inverter(method, 4), guidance_scale=scales[1])
    one = runner_of(verifier, model, scales[0])
    budget = 3 * one.cost(0, 8) + 5
    found = search(one, tmp_path, ALGORITHMS[algorithm], budget)
    assert one.ledger.nfe == model.rows
    for each in found:
        assert each.best is not None and each.spent_nfe <= budget
    assert sum(each.spent_nfe for each in found) == model.rows


@pytest.mark.parametrize("measure", ["cosine", "residual", "contraction"])
@pytest.mark.parametrize("partial_steps", [None, 3])
def test_a_score_is_that_of_the_round_trip(
    measure: Any, partial_steps: int | None, tmp_path: Path
) -> None:
    model, inverter = Toy(), Inverter("fixed_point", 4)
    verifier = Stability(inverter, measure, 1.0, partial_steps)
    one = runner_of(verifier, model)
    steps = 8 if partial_steps is None else partial_steps
    assert one.cost(0, 8) == 8 + 4 * steps
    search(one, tmp_path, ALGORITHMS["random"], 5 * one.cost(0, 8))
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").open()]
    denoise = reader(ZERO_SNR)
    for row in rows:
        noise = seeded_noise(row["seed"], model.shape)[None]
        x = run("ddim", denoise, one.grid, SampleState(noise), steps).x
        back = invert(denoise, one.grid, x, inverter, start=steps)
        expected = {
            "cosine": torch.cosine_similarity(noise.flatten(), back.x.flatten(), dim=0),
            "residual": -back.residual.mean(),
            "contraction": -back.contraction.mean(),
        }[measure]
        assert row["score"] == pytest.approx(expected.item(), abs=2e-4)


def test_halving_by_stability_inverts_each_run_from_where_it_stands(tmp_path: Path) -> None:
    verifier = Stability(Inverter("ddim"))
    one = runner_of(verifier, Toy())
    search(one, tmp_path, ALGORITHMS["halving"], 100)
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").open()]
    by_key = {(row["prompt_index"], row["candidate"]): row for row in rows}
    denoise = reader(ZERO_SNR)
    for (prompt, _), row in by_key.items():
        first = row
        while first["parent"] is not None:
            first = by_key[prompt, first["parent"]]
        noise = seeded_noise(first["seed"], SHAPE_OF_TOY)[None]
        x = run("ddim", denoise, one.grid, SampleState(noise), row["stop"]).x
        back = invert(denoise, one.grid, x, Inverter("ddim"), start=row["stop"]).x
        cosine = torch.cosine_similarity(noise.flatten(), back.flatten(), dim=0).item()
        assert row["score"] == pytest.approx(cosine, abs=2e-4)
    assert {row["goal"] for row in rows} == {"preview", "final"}


SHAPE_OF_TOY = Toy().shape


def test_previews_that_nobody_looks_at_are_not_decoded(tmp_path: Path) -> None:
    model = Toy()
    found = search(
        runner_of(Stability(Inverter("ddim")), model), tmp_path, ALGORITHMS["halving"], 99
    )
    finals = sum(len(each.finals) for each in found)
    assert model.decoded == finals
    model = Toy()
    search(runner_of(Scored(), model), tmp_path / "seen", ALGORITHMS["halving"], 99)
    assert model.decoded > finals


def test_the_verb_searches_for_stable_noises(pipeline: Path, tmp_path: Path) -> None:
    """The score of a winner is that of its seed, by the model itself."""
    stable = VerifierConfig(kind="stability", inversion="fixed_point", num_iterations=3)
    settings: dict[str, Any] = {
        "checkpoint": str(pipeline),
        "prompts": ["a red photo", "a blue night"],
        "budget_nfe": 64,
        "num_steps": 4,
        "guidance_scale": 1.0,
        "verifiers": {"stable": stable},
        "held_out": {"dark": VerifierConfig(kind="luminance", target=0.0)},
    }
    search_to_folder(SearchConfig(output=str(tmp_path / "out"), **settings))
    rows = [json.loads(line) for line in (tmp_path / "out" / "winners.jsonl").open()]
    assert [row["nfe"] for row in rows] == [64, 64]  # four images of 4 + 12
    assert all(-1 <= row["score"] <= 1 for row in rows)
    assert all(row["score"] >= row["baseline"]["scores"]["stable"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "paths"}, "kind=stability compares a run with its noise"),
        ({"sampler": "heun"}, "use sampler=ddim without eta, not sampler=heun"),
        ({"eta": 0.5}, "use sampler=ddim without eta"),
        ({"held_out": {"own": "stable"}}, "held_out.own: kind=stability"),
        ({"algorithm": "halving", "partial": 2}, "partial_steps goes with random and zero_order"),
    ],
    ids=str,
)
def test_searches_that_it_cannot_score_are_refused(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    stable = VerifierConfig(kind="stability", partial_steps=changes.pop("partial", None))
    if "held_out" in changes:
        changes["held_out"] = {"own": stable}
    verifiers = {"stable": stable}
    given = {"verifiers": verifiers} | changes
    with pytest.raises(UserError, match=message):
        SearchConfig("x", "a red photo", "out", budget_nfe=9, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_steps": 0}, "partial_steps=0"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"inversion_guidance_scale": -1.0}, "inversion_guidance_scale=-1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VerifierConfig(kind="stability", **changes)


def test_a_rate_needs_iterates() -> None:
    with pytest.raises(UserError, match="contraction with inversion=ddim and 1 evaluations"):
        Stability(Inverter("ddim"), "contraction")


def test_a_picture_alone_is_not_scored() -> None:
    """What needs a run has no score of an image, so it is never taken for a verifier of images."""
    stable = Stability(Inverter("ddim"))
    assert isinstance(stable, TrajectoryVerifier) and not hasattr(stable, "score")
    assert of_images({"stable": stable}) == {}


def test_the_own_inverse_of_a_converged_iteration_is_stable() -> None:
    """With enough iterations every noise is a fixed point: that is why it ranks nothing."""
    model = Toy()
    noise = torch.stack([seeded_noise(seed, model.shape) for seed in range(4)])
    one = runner_of(Scored(), model)
    denoise = reader(ZERO_SNR)
    x = run("ddim", denoise, one.grid, SampleState(noise)).x
    verifier = Stability(Inverter("fixed_point", 60))
    scores = verifier.score_measured(noise, verifier.measure(x, 8, denoise, one.grid))
    assert_close(scores, torch.ones(4), rtol=0, atol=1e-3)


def test_verifiers_of_one_round_trip_share_it_and_score_as_alone(tmp_path: Path) -> None:
    inverter = Inverter("fixed_point", 4)
    measured = [Stability(inverter, measure, name=measure) for measure in ("cosine", "residual")]
    verifiers = [*measured, Stability(Inverter("ddim"), name="ddim")]
    model = Toy()
    settings = SamplingOptions(num_steps=8, guidance_scale=1.0)
    weights = {one.name: 1.0 for one in verifiers}
    one = TrialRunner(model, {0: "a"}, settings, verifiers, weights, 5)  # type: ignore[arg-type]
    assert one.cost(0, 8) == 8 + 4 * 8 + 8
    [found] = search(one, tmp_path / "all", ALGORITHMS["random"], 3 * one.cost(0, 8))
    assert one.ledger.nfe == model.rows == 3 * one.cost(0, 8)
    for verifier in verifiers:
        alone = runner_of(verifier, Toy())
        alone_found = search(alone, tmp_path / verifier.name, ALGORITHMS["random"], 3 * 48)
        for mine, own in zip(found.finals, alone_found[0].finals, strict=False):
            assert mine.scores[verifier.name] == pytest.approx(own.scores[verifier.name], abs=1e-4)
