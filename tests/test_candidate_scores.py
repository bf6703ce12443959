"""Several images of each prompt: rank correlations, the best of k, and where they are shown."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from blackpoint.sampling.report.candidate_tables import candidate_tables
from blackpoint.sampling.report.results import read_results
from blackpoint.sampling.report.results_page import tables_of
from blackpoint.sampling.statistics.candidate_scores import (
    Candidates,
    Scores,
    counts_up_to,
    expected_of_best,
    gain_of_best,
    rank_correlation,
    scores_by_prompt,
)

NUM_PROMPTS, NUM_IMAGES = 30, 20


def made_up(rho: float = 0.0) -> Scores:
    """Returns scores in which ddim has the correlation rho with dark, and nothing with border."""
    rng = np.random.default_rng(0)
    dark, border, other = rng.normal(size=(3, NUM_PROMPTS, NUM_IMAGES))
    return {"ddim": rho * dark + (1 - rho**2) ** 0.5 * other, "dark": dark, "border": border}


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_correlations_are_means_over_prompts_and_find_what_is_there(rho: float) -> None:
    scores = made_up(rho)
    found = rank_correlation(scores, "ddim", "dark")
    assert found is not None
    pairs = list(zip(scores["ddim"], scores["dark"], strict=True))
    assert found.spearman.value == pytest.approx(np.mean([stats.spearmanr(*p)[0] for p in pairs]))
    assert found.kendall.value == pytest.approx(np.mean([stats.kendalltau(*p)[0] for p in pairs]))
    # A normal pair's Spearman is 6 / pi asin(rho / 2).
    expected = 6 / np.pi * np.arcsin(rho / 2)
    assert found.spearman.low - 0.05 < expected < found.spearman.high + 0.05
    assert (found.spearman.low > 0) == (rho > 0)
    assert found.spearman.n == NUM_PROMPTS and 0 < found.detectable < 0.3


def test_prompts_without_a_ranking_are_left_out() -> None:
    scores = made_up()
    scores["dark"][:10] = -1.0  # all the same
    scores["dark"][10, :-2] = np.nan  # two are left
    scores["dark"][11, 3] = np.nan
    found = rank_correlation(scores, "ddim", "dark")
    assert found is not None and found.spearman.n == NUM_PROMPTS - 11
    scores["dark"][:] = 0.0
    assert rank_correlation(scores, "ddim", "dark") is None


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


def test_the_best_of_k_by_the_quality_itself_is_that_of_order_statistics() -> None:
    scores = made_up()
    assert counts_up_to(NUM_IMAGES) == [1, 2, 5, 10, 20]
    assert gain_of_best(scores, "dark", "dark", 1) == pytest.approx(0, abs=1e-12)
    top = (scores["dark"].max(axis=1) - scores["dark"].mean(axis=1)).mean()
    assert gain_of_best(scores, "dark", "dark", NUM_IMAGES).mean() == pytest.approx(top)
    # E[max of 5 normals]; the finite pool has its own
    assert gain_of_best(scores, "dark", "dark", 5).mean() == pytest.approx(1.163, abs=0.15)


def test_an_image_without_a_number_takes_no_part() -> None:
    scores = made_up()
    chosen = scores["ddim"][0].argmax()
    scores["ddim"][0, chosen] = scores["dark"][1, 4] = np.nan
    scores["dark"][2] = np.nan
    found = expected_of_best(scores["ddim"], scores["dark"], NUM_IMAGES)
    assert found[0] == scores["dark"][0, np.nanargmax(scores["ddim"][0])]
    assert np.isnan(found[2]) and np.isfinite(np.delete(found, 2)).all()


def test_a_prompt_with_fewer_images_says_how_many_count() -> None:
    rows = [(p, k, {"a": float(k), "b": "NaN"}) for p in (1, 0) for k in range(5 - p)]
    scores = scores_by_prompt(reversed(rows), ["a", "b"])
    assert scores is not None
    np.testing.assert_array_equal(scores["a"], [[0, 1, 2, 3]] * 2)
    assert np.isnan(scores["b"]).all()
    assert scores_by_prompt(rows[:6], ["a"]) is None  # two images of prompt 0
    assert scores_by_prompt([], ["a"]) is None


def test_scores_of_runs_are_compared_and_no_quality() -> None:
    scores = made_up(0.6) | {"partial": made_up()["border"]}
    ranks, best = candidate_tables({"pool": Candidates(scores, ("dark",))})
    pairs = [(row["score"], row["with"]) for row in ranks.rows]
    assert ("border", "partial") not in pairs and ("ddim", "partial") in pairs
    assert ("ddim", "dark") in pairs and ("dark", "partial") in pairs
    assert {row["quality"] for row in best.rows} == {"dark"}
    assert [row["best of k by"] for row in best.rows] == list(scores)
    gains = {row["best of k by"]: row[f"k = {NUM_IMAGES}"] for row in best.rows}
    assert gains["ddim"].value.low > 0 and best.header[-2] == f"k = {NUM_IMAGES}"


def write_search(folder: Path, algorithm: str) -> Path:
    """Writes what a search of two verifiers leaves, one of which has weight 0."""
    folder.mkdir()
    luminance = {"kind": "luminance", "weight": 1.0}
    verifiers = {"dark": luminance, "border": luminance | {"weight": 0.0}}
    settings = {"algorithm": algorithm, "verifiers": verifiers, "ensemble": "weighted_sum"}
    (folder / "search.json").write_text(json.dumps(settings))
    (folder / "hacking.json").write_text("[]")
    scores = made_up()
    candidates, winners = [], []
    for prompt in range(4):
        for number in range(5):
            own = {name: scores[name][prompt, number] for name in verifiers}
            row = {"prompt_index": prompt, "candidate": number, "scores": own}
            candidates.append(json.dumps(row))
        about = {"prompt": f"p {prompt}", "seed": 1, "nfe": 9, "image": "none", "held_out": {}}
        winners.append(json.dumps(row | about))
    (folder / "candidates.jsonl").write_text("\n".join(candidates) + "\n")
    (folder / "winners.jsonl").write_text("\n".join(winners) + "\n")
    return folder


def test_any_best_of_n_search_shows_what_its_scores_are_worth(tmp_path: Path) -> None:
    results = read_results(write_search(tmp_path / "random", "random"))
    names = [table.name for table in tables_of(results)]
    assert names == ["metrics", "ranks", "best_of_k"]
    # What has no part in the choice was not searched for.
    assert list(results.cells[0].values) == ["dark (searched)", "border"]
    other = read_results(write_search(tmp_path / "halving", "halving"))
    assert [table.name for table in tables_of(other)] == ["metrics"]
