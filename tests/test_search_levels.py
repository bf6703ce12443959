"""Verifiers of some noise levels, and of latents: who scores which look, and what is decoded."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.search.algorithms.fk_steering import FkSteeringConfig
from blackpoint.sampling.search.algorithms.halving import HalvingConfig
from blackpoint.sampling.search.algorithms.tilt import TiltConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.search.scoring import Scoring, covered_levels
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.verifier import of_images
from blackpoint.scripts.sweep.costs import costs_of_search
from tests.search_problems import GaussianModel
from tests.test_search_tilt import Reward, first_pixel, runner_of
from tests.test_search_verb import config, rows

DARK, BRIGHT = (VerifierConfig(kind="luminance", target=target) for target in (0.0, 1.0))
EARLY = {"verifiers": {"early": BRIGHT, "late": DARK}, "verifier_levels": {"early": [0.0, 0.8]}}
HALVING: dict[str, Any] = {
    "algorithm": "halving",
    "halving": HalvingConfig([0.5], min_kendall=-1.0, calibration_prompts=1),
}


class LatentMean:
    """Scores previews of the noisy half alone, by their latents, with gradients."""

    takes_latents, differentiable, log_snr_range = True, True, (-math.inf, 0.0)

    def score(self, latents: Tensor, prompts: Any, previews: Any = None) -> Tensor:
        assert latents.shape[1:] == (4, 8, 8)
        return latents.tanh().mean(dim=(1, 2, 3))


LATENT = VerifierConfig(kind="custom", module="tests.test_search_levels:LatentMean")


def test_levels_are_those_between_two_shares_of_the_steps() -> None:
    assert covered_levels([0.25, 0.5], 8) == {2, 3, 4}
    assert covered_levels([0.3, 0.7], 10) == {3, 4, 5, 6, 7}
    assert covered_levels([0.5, 1.0], 4) == {2, 3, 4}


def test_a_look_is_scored_by_whom_covers_it_and_else_by_those_without_levels() -> None:
    early, late = Reward(first_pixel, "early"), Reward(first_pixel, "late")
    plain = runner_of(early, late)
    grid, process = plain.grid, GaussianModel().process

    def names(levels: dict[str, list[float]], *verifiers: Any, **given: float) -> list[list[str]]:
        weights = dict.fromkeys([one.name for one in verifiers], 1.0) | given
        scoring = Scoring(verifiers, weights, process, grid, levels)
        looks = range(1, grid.num_steps + 1)
        return [[one.name for one in scoring.at(level)] for level in looks]

    both = [["early", "late"]] * 6
    assert names({}, early, late) == both
    assert names({"early": [0.0, 0.5]}, early, late) == [["early"]] * 3 + [["late"]] * 3
    with pytest.raises(UserError, match="scores step 1 of 6 has weight=0, and would rank nothing"):
        names({"early": [0.0, 0.5]}, early, late, early=0.0)
    halves = {"early": [0.2, 0.5], "late": [1.0, 1.0]}
    assert names(halves, early, late) == [["late"], ["early"], ["early"], *[["late"]] * 3]
    # A declaration is of the state that a preview was read from: level k is read at step k - 1.
    log_snr = process.schedule.log_snr[list(grid.timesteps)].tolist()
    early.log_snr_range = (log_snr[1], log_snr[2])  # type: ignore[attr-defined]
    assert names({}, early, late) == [["late"], ["early"], ["early"], *[["late"]] * 3]
    with pytest.raises(UserError, match="none the final image; add one without levels"):
        names({}, early)
    early.log_snr_range = (log_snr[1], math.inf)  # type: ignore[attr-defined]
    assert names({}, early)[-1] == ["early"]


@pytest.mark.parametrize(
    "changes",
    [HALVING, {"algorithm": "fk_steering", "eta": 1.0, "ensemble": "weighted_sum"}],
    ids=["halving", "FK steering"],
)
def test_previews_are_ranked_by_one_verifier_and_images_by_another(
    changes: dict[str, Any], pipeline: Path, tmp_path: Path
) -> None:
    steering = FkSteeringConfig(resample_every_steps=2)
    asked = config(pipeline, tmp_path / "out", fk_steering=steering, **changes, **EARLY)
    output, _ = search_to_folder(asked)
    candidates = rows(output, "candidates.jsonl")
    assert {row["goal"] for row in candidates} == {"preview", "final"}
    for row in candidates:
        assert [*row["scores"]] == [{"preview": "early", "final": "late"}[row["goal"]]]
        assert row["score"] == pytest.approx(sum(row["scores"].values()), abs=1e-4)
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["verifier_calls"] == len(candidates) == 2 * costs_of_search(asked).verifier_calls
    for row in rows(output, "winners.jsonl"):
        finals = [
            one["score"]
            for one in candidates
            if one["goal"] == "final" and one["prompt_index"] == row["prompt_index"]
        ]
        assert row["score"] == max(finals) and [*row["scores"]] == ["late"]
    if "halving" in changes:  # the kept ones are the best by the early verifier
        for index in (0, 1):
            looks = [one for one in candidates if one["prompt_index"] == index]
            previews = {one["candidate"]: one for one in looks if one["goal"] == "preview"}
            kept = {one["parent"] for one in looks if one["goal"] == "final"}
            worst = min(previews[parent]["score"] for parent in kept)
            dropped = [one["score"] for key, one in previews.items() if key not in kept]
            assert dropped and worst >= max(dropped)


def test_latents_are_scored_without_decoding_them(pipeline: Path, tmp_path: Path) -> None:
    """Previews of the noisy half cost no decode; a tilt there takes one of each later step."""
    verifiers = {"latent": LATENT, "late": DARK}
    output, _ = search_to_folder(config(pipeline, tmp_path / "out", verifiers=verifiers, **HALVING))
    candidates = rows(output, "candidates.jsonl")
    for row in candidates:
        is_preview = row["goal"] == "preview"
        assert [*row["scores"]] == ["latent" if is_preview else "late"]
        assert row["spent"]["decoded_images"] == (0 if is_preview else 1)
    tilt = {"algorithm": "tilt", "eta": 1.0, "tilt": TiltConfig(strength=0.3)}
    tilted, _ = search_to_folder(config(pipeline, tmp_path / "tilt", verifiers=verifiers, **tilt))
    process = DiffusionModel.load(pipeline).process
    log_snr = process.schedule.log_snr[list(process.grid(4).timesteps)]
    num_decoded = int((log_snr[:3] > 0).sum())
    assert 0 < num_decoded < 3
    for row in rows(tilted, "candidates.jsonl"):
        assert [*row["scores"]] == ["late"]
        assert row["spent"]["decoded_images"] == num_decoded + 1
        assert row["spent"]["verifier_gradients"] == 3


def test_where_only_images_are_a_verifier_of_latents_is_refused(
    pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="latent takes latents, and it is given decoded images"):
        search_to_folder(config(pipeline, tmp_path / "out", held_out={"latent": LATENT}))
    assert not (tmp_path / "out").exists()
    loaded = load_verifier(LATENT, torch.device("cpu"))
    with pytest.raises(UserError, match="takes latents"):
        of_images({"own": loaded})


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"other": [0.0, 1.0]}, "verifier_levels.other is of none of the verifiers, dark"),
        ({"dark": [0.5]}, "verifier_levels.dark="),
        ({"dark": [0.9, 0.1]}, "shares of the sampling steps"),
        ({"dark": [0.0, 1.5]}, "shares of the sampling steps"),
    ],
)
def test_levels_that_are_none_are_refused(levels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(Path("model"), Path("out"), verifier_levels=levels)


def test_levels_do_not_go_with_scores_of_whole_runs(pipeline: Path, tmp_path: Path) -> None:
    verifiers = {"early": DARK, "stable": VerifierConfig(kind="stability")}
    given: dict[str, Any] = {"verifiers": verifiers, "verifier_levels": {"early": [0.0, 0.5]}}
    with pytest.raises(UserError, match="verifiers.stable compares a run with its noise at every"):
        search_to_folder(config(pipeline, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()
