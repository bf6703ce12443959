"""`blackpoint evaluate study=stability`: its statistics, what it runs and writes, and refusals."""

import csv
import gzip
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.image.kid import poly_mmd

from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_arms import Place, Prices, arms, places
from blackpoint.sampling.evaluation.stability_findings import (
    ablation,
    best_of,
    cheaper,
    chosen,
    comparisons,
    correlations,
    counts,
    expected_of_best,
)
from blackpoint.sampling.evaluation.stability_rows import Ascent, Found, Noises
from blackpoint.sampling.statistics.kernel_distance import kernel_distance
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.scripts.cli import main

QUALITY = {"dark": VerifierConfig(kind="luminance", target=0.0)}
QUALITY["border"] = VerifierConfig(kind="luminance", target=0.0, where="border")
NUM_PROMPTS, NUM_NOISES, NUM_STEPS = 30, 20, 4


def config(**changes: Any) -> StabilityStudyConfig:
    settings: dict[str, Any] = {
        "checkpoints": {"mine": "folder"},
        "prompts": ["a"],
        "quality": QUALITY,
        "num_noises": NUM_NOISES,
        "num_steps": [NUM_STEPS],
        "num_optimisation_steps": 5,
    }
    return StabilityStudyConfig(**(settings | changes))


def made_up(rho: float = 0.0) -> Found:
    """Returns rows in which ddim has the correlation rho with dark, and nothing with border."""
    rng = np.random.default_rng(0)
    settings = config()
    names = ["ddim_clean_time", "fixed_point", "residual", "contraction", "partial_half"]
    shape = (NUM_PROMPTS, NUM_NOISES)
    dark = rng.normal(size=shape)
    scores = {name: rng.normal(size=shape) for name in [*names, "partial_quarter", "border"]}
    scores["dark"] = dark
    scores["ddim"] = rho * dark + (1 - rho**2) ** 0.5 * rng.normal(size=shape)

    def noises(values: dict[str, np.ndarray]) -> Noises:
        count = values["dark"].shape[1]
        prompts = list(range(NUM_PROMPTS))
        seeds = np.arange(NUM_PROMPTS * count).reshape(NUM_PROMPTS, count)
        return Noises(prompts, [f"prompt {n}" for n in prompts], seeds, values, 1.0)

    many = {name: rng.normal(size=(NUM_PROMPTS, 50)) for name in QUALITY}
    guided = {name: rng.normal(size=(NUM_PROMPTS, 1)) + 1 for name in QUALITY}
    first, best = np.zeros(NUM_PROMPTS), np.ones(NUM_PROMPTS)
    ascent = Ascent(
        "reward",
        {"dark": best + 3, "border": best},
        first,
        best,
        np.full(NUM_PROMPTS, 5),
        1.0,
    )
    place = Place("mine", NUM_STEPS)
    return Found(settings, place, noises(scores), noises(many), {7.5: noises(guided)}, [ascent])


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_correlations_are_means_over_prompts_and_find_what_is_there(rho: float) -> None:
    found = made_up(rho)
    table = {(each.first, each.second): each for each in correlations(found)}
    assert set(table) == set(itertools.product(found.stability, found.quality))
    each = table["ddim", "dark"]
    pairs = list(zip(found.pool.scores["ddim"], found.pool.scores["dark"], strict=True))
    assert each.spearman.value == pytest.approx(np.mean([stats.spearmanr(*p)[0] for p in pairs]))
    assert each.kendall.value == pytest.approx(np.mean([stats.kendalltau(*p)[0] for p in pairs]))
    # A normal pair's Spearman is 6 / pi asin(rho / 2).
    expected = 6 / np.pi * np.arcsin(rho / 2)
    assert each.spearman.low - 0.05 < expected < each.spearman.high + 0.05
    assert (each.spearman.low > 0) == (rho > 0)
    assert each.spearman.n == NUM_PROMPTS and 0 < each.detectable < 0.3
    assert table["ddim", "border"].spearman.low < 0 < table["ddim", "border"].spearman.high


def test_prompts_without_a_ranking_are_left_out() -> None:
    found = made_up()
    found.pool.scores["dark"][:10] = -1.0  # all the same
    found.pool.scores["dark"][10, :-2] = np.nan  # two are left
    found.pool.scores["dark"][11, 3] = np.nan
    [each] = [e for e in correlations(found) if (e.first, e.second) == ("ddim", "dark")]
    assert each.spearman.n == NUM_PROMPTS - 11


def test_the_expected_best_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(1)
    score, quality = rng.integers(0, 4, (3, 7)).astype(float), rng.normal(size=(3, 7))
    for count in range(1, 8):
        subsets = list(itertools.combinations(range(7), count))
        expected = [
            np.mean([q[list(s)][np.argmax(x[list(s)])] for s in subsets])
            for x, q in zip(score, quality, strict=True)
        ]
        np.testing.assert_allclose(expected_of_best(score, quality, count), expected)


def test_a_noise_without_a_number_takes_no_part() -> None:
    found = made_up()
    found.pool.scores["ddim"][0, 3] = found.pool.scores["dark"][1, 4] = np.nan
    all_noises = {e.num_noises: e for e in ablation(found) if e.score == "ddim"}[NUM_NOISES]
    assert all_noises.quality["dark"].n == NUM_PROMPTS
    assert all_noises.quality["dark"].value == pytest.approx(chosen(found, "ddim")["dark"].mean())
    assert all(np.isfinite(each.difference.value) for each in comparisons(found))


def test_the_best_of_k_by_quality_itself_is_that_of_order_statistics() -> None:
    found = made_up()
    table = {(each.score, each.num_noises): each for each in ablation(found)}
    assert [n for name, n in table if name == "ddim"] == counts(NUM_NOISES) == [1, 2, 5, 10, 20]
    assert table["dark", 1].gain["dark"].value == pytest.approx(0, abs=1e-12)
    top = found.pool.scores["dark"].max(axis=1).mean()
    assert table["dark", 20].quality["dark"].value == pytest.approx(top)
    # E[max of 5 normals]; the finite pool has its own
    assert table["dark", 5].quality["dark"].value == pytest.approx(1.163, abs=0.15)
    assert table["ddim", 20].nfe == 20 * 8 and table["dark", 20].nfe == 20 * 4


def test_a_choice_takes_the_best_noise_and_best_of_n_keeps_the_budget() -> None:
    found = made_up()
    score, dark = found.pool.scores["ddim"], found.pool.scores["dark"]
    rows = np.arange(NUM_PROMPTS)
    np.testing.assert_array_equal(chosen(found, "ddim")["dark"], dark[rows, score.argmax(axis=1)])
    least = chosen(found, "ddim", worst=True)["dark"]
    np.testing.assert_array_equal(least, dark[rows, score.argmin(axis=1)])
    score[0] = np.nan
    score[0, 7] = -5.0
    assert (
        chosen(found, "ddim")["dark"][0]
        == dark[0, 7]
        == chosen(found, "ddim", worst=True)["dark"][0]
    )
    searched = found.best_of.scores
    np.testing.assert_array_equal(
        best_of(found, 4 * NUM_STEPS + 3)["border"],
        searched["border"][rows, searched["dark"][:, :4].argmax(axis=1)],
    )


def test_every_method_meets_every_rival_and_holm_counts_them() -> None:
    found = made_up()
    lines = comparisons(found)
    rivals = {each.rival for each in lines}
    assert rivals == {
        "random noise, guidance 1",
        "random noise, guidance 7.5",
        "least stable noise",
        "best-of-N at equal NFE",
    }
    assert len(lines) == 2 * 4 * 2
    for each in lines:
        own = [e for e in lines if e.method == each.method]
        assert each.adjusted_p_value >= each.outcomes.p_value
        least = min(e.outcomes.p_value for e in own)
        if each.outcomes.p_value == least:
            assert each.adjusted_p_value == pytest.approx(min(1.0, len(own) * least))
        assert each.rival_nfe <= each.nfe or "best-of-N" not in each.rival
    reward = [e for e in lines if "reward" in e.method and e.quality == "dark"]
    assert all(e.difference.low > 0 and e.outcomes.wins == NUM_PROMPTS for e in reward[1:2])
    assert all(np.isfinite(e.detectable) for e in lines)


def test_a_partial_score_costs_less_and_loses_what_it_loses() -> None:
    found = made_up()
    scores = found.pool.scores
    scores["partial_half"] = scores["ddim"] + 0.0
    table = {each.score: each for each in cheaper(found)}
    half = table["partial_half"]
    assert half.agreement.value == pytest.approx(1) and half.loss["dark"].value == 0
    assert (half.nfe, table["ddim"].nfe, table["fixed_point"].nfe) == (2, 4, 12)
    assert half.selection_nfe == NUM_NOISES * (2 + 2) + 2
    assert table["ddim"].selection_nfe == NUM_NOISES * 8


def test_the_kernel_distance_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40, 6, generator=generator, dtype=torch.float64)
    assert kernel_distance(first, second) == pytest.approx(float(poly_mmd(second, first)))


SETTINGS = [
    "study=stability",
    'prompts=["a red photo of snow", "a blue night", "a photo of the night"]',
    "quality.dark.kind=luminance",
    "quality.dark.target=0",
    "quality.border.kind=luminance",
    "quality.border.target=0",
    "quality.border.where=border",
    "num_noises=6",
    "num_steps=[2,3]",
    "num_optimisation_steps=2",
    "optimised_num_steps=[3]",
    "measure_memory=false",
    "sets.num_images=2",
    "sets.classifier.module=tests.tiny_vision:ThreeColors",
    "sets.features.module=tests.tiny_vision:ThreeColors",
]


def arguments(pipeline: Path, output: Path, reference: Path, *more: str) -> list[str]:
    given = [f"checkpoints.mine={pipeline}", f"output={output}", f"sets.reference={reference}"]
    return ["evaluate", *SETTINGS, *given, *more]


def make_references(folder: Path) -> Path:
    from blackpoint.sampling.runtime.pictures import to_picture

    folder.mkdir()
    for number, image in enumerate(torch.rand(4, 3, 16, 16)):
        to_picture(image).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_the_verb_runs_resumes_and_shows_everything(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = make_references(tmp_path / "real")
    command = arguments(pipeline, tmp_path / "out", reference)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert (
        "Too few prompts to tell anything (3)" in out
        and str(tmp_path / "out" / "report.html") in out
    )
    output = tmp_path / "out"
    # What the searches spent is what the study says that methods cost.
    for steps in (2, 3):
        place = output / "mine" / f"{steps}_steps"
        spent = {
            path.parent.name: json.loads(path.read_text())["nfe"] / 3
            for path in place.glob("*/ledger.json")
        }
        prices = Prices(config(num_noises=6, num_optimisation_steps=2), steps)
        assert spent["pool"] == prices.pool()
        assert spent["guidance_7.5"] == prices.image(7.5) == 2 * steps
        assert spent["optimise_fixed_inverse"] == prices.optimisation("fixed_inverse")
        assert ("optimise_stability" in spent) == ("optimise_reward" in spent) == (steps == 3)
        if steps == 3:
            assert spent["optimise_stability"] == prices.optimisation("stability")
            assert spent["optimise_reward"] == prices.optimisation("reward")
    text = gzip.decompress((output / "pairs.csv.gz").read_bytes()).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    pool = [row for row in rows if row["search"] == "pool"]
    assert len(pool) == 2 * 3 * 6 and all(float(row["ddim"]) <= 1 for row in pool)
    first = {(r["num_steps"], r["prompt_index"], r["noise"]): r["seed"] for r in pool}
    searched = [row for row in rows if row["search"] == "best_of"]
    shared = [r for r in searched if (r["num_steps"], r["prompt_index"], r["noise"]) in first]
    assert shared and all(
        first[r["num_steps"], r["prompt_index"], r["noise"]] == r["seed"] for r in shared
    )
    page = (output / "report.html").read_text()
    for text in ("FID", "KID", "IS", "best-of-N", "guidance 7.5", "k = 5", "peak memory"):
        assert text in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "least stable" in (output / "results.md").read_text()
    # Again: nothing is painted twice, and the same comes out.
    before = {path: path.read_bytes() for path in output.rglob("candidates.jsonl")}
    tables = (output / "results.md").read_text()
    assert main(command) == 0
    assert {path: path.read_bytes() for path in output.rglob("candidates.jsonl")} == before
    assert (output / "results.md").read_text() == tables


BAD = {
    "num_noises=0": "one noise has no rank",
    "num_noises=1": "give at least 2",
    "num_steps=[]": "must be one number or more",
    "num_steps=[3,0]": "0 must be at least 1",
    "optimised_num_steps=[7]": "must be among num_steps",
    "quality.ddim.kind=luminance": "is the name of a stability score",
    "quality.odd.kind=stability": "does not judge a picture by itself",
    "stability.odd.kind=luminance": "is no stability score",
    "stability.p.kind=stability stability.p.partial_steps=3": "more than num_steps=2",
    "sets.num_images=4": "at most half of num_noises=6",
    "sets.reference=null": "go together",
    "sets.reference=nowhere": "holds 0 pictures",
    "rival_guidance_scales=[-1]": "must be at least 0",
    "gradient_batch_size=0": "gradient_batch_size=0 must be at least 1",
    "num_optimisation_steps=1": "must be at least 2",
    "sets.classifier.module=tests.tiny_vision:Nothing": "Nothing",
    "checkpoints.other=nowhere": "checkpoints.other: checkpoint=nowhere does not exist",
    "study=stabil": "did you mean study=stability?",
    "optimisations=[rewards]": "optimisations",
}


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_settings_are_refused_before_anything_is_written(
    wrong: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = make_references(tmp_path / "real")
    command = arguments(pipeline, tmp_path / "out", reference, *wrong.split())
    assert main(command) == 2
    error = capsys.readouterr().err
    assert BAD[wrong] in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_places_share_a_noise_and_every_arm_has_its_folder() -> None:
    settings = config(num_steps=[10, 4], checkpoints={"a": "x", "b": "y"})
    found = [(place.num_steps, place.checkpoint) for place in places(settings)]
    assert found == [(4, "a"), (4, "b"), (10, "a"), (10, "b")]
    folders = [arm.config.output for place in places(settings) for arm in arms(settings, place)]
    assert len(set(folders)) == len(folders) == 4 * 6
