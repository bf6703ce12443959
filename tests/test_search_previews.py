"""The sheet of x0-previews along the runs that led."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.picture_grid import CAPTION_WIDTH_PX, GAP_PX, SURROUND
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.algorithms.halving import HalvingConfig
from blackpoint.sampling.search.algorithms.random_search import (
    RandomSearchConfig,
    random_search,
)
from blackpoint.sampling.search.config import PreviewConfig
from blackpoint.sampling.search.driver import PromptSearch
from blackpoint.sampling.search.problem import Problem, Renoised, Seeded, Trial
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.search.winners import Winners
from blackpoint.scripts.sweep.costs import costs_of_search
from tests.test_search_tilt import Gaussian, Reward, curved, runner_of
from tests.test_search_verb import PROMPTS, config, rows

CELL = 128 + GAP_PX
HALVING: dict[str, Any] = {
    "algorithm": "halving",
    "halving": HalvingConfig([0.5], min_kendall=-1.0, calibration_prompts=1),
}


def shown(sheet: Image.Image, row: int, column: int) -> bool:
    """Whether a cell holds a picture."""
    top = sheet.height - (row + 1) * CELL  # of the rows from below
    left = CAPTION_WIDTH_PX + column * CELL
    colors = sheet.crop((left, top, left + 128, top + 128)).getcolors(128 * 128)
    return colors != [(128 * 128, SURROUND)]


def test_a_preview_is_the_decoded_x0_prediction_of_its_step(pipeline: Path) -> None:
    model = DiffusionModel.load(pipeline)
    one = runner_of(Reward(curved), model=model, eta=None, num_steps=5)
    one.previews_every = 2
    trials = [(0, Trial(0, seed, Seeded(seed), 5, "final", seed)) for seed in (3, 4)]
    found = dict(one.run(trials))
    conditions = model.encode_prompts([PROMPTS[0]])
    for number, seed in enumerate((3, 4)):
        assert [*found[number].previews] == [2, 4]
        for level, preview in found[number].previews.items():
            with torch.no_grad():
                start = SampleState(one.draw([seed]))
                x0 = run("ddim", model.denoiser(conditions), one.grid, start, level).x0
            assert x0 is not None
            assert_close(preview, model.decode(x0)[0], rtol=0, atol=1e-4)
    assert one.ledger.decoded_images == 2 * (2 + 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"algorithm": "paths", "num_steps": 6}, {"algorithm": "zero_order"}, HALVING],
    ids=lambda changes: changes.get("algorithm", "random"),
)
def test_the_sheet_has_the_runs_that_led_and_changes_nothing_else(
    changes: dict[str, Any], pipeline: Path, tmp_path: Path
) -> None:
    plain, _ = search_to_folder(config(pipeline, tmp_path / "plain", **changes))
    asked = config(pipeline, tmp_path / "out", previews=PreviewConfig(every=1), **changes)
    output, _ = search_to_folder(asked)
    for name in ("candidates.jsonl", "winners.jsonl"):
        for one, two in zip(rows(plain, name), rows(output, name), strict=True):
            assert (one["score"], one["nfe"]) == (two["score"], two["nfe"])
    assert {path.name for path in output.iterdir()} == {path.name for path in plain.iterdir()}
    levels = asked.num_steps - 1
    for row in rows(output, "winners.jsonl"):
        name = row["image"].replace(".png", ".previews.png")
        assert not (plain / name).exists()
        sheet = Image.open(output / name)
        assert sheet.width == CAPTION_WIDTH_PX + (levels + 1) * CELL
        assert all(shown(sheet, 0, column) for column in range(levels + 1))  # of the winner
    if changes.get("algorithm") != "paths":  # whose plan takes another schedule
        ledger = json.loads((output / "ledger.json").read_text())
        assert ledger["decoded_images"] == 2 * costs_of_search(asked).decoded_images


def test_a_run_that_goes_back_shows_what_it_went_on_from(tmp_path: Path) -> None:
    """Re-noised, it leaves the steps of its parent that it repeats. From noise without a signal the
    ideal x0 is the mean, the same for all."""
    one = runner_of(Reward(curved), model=Gaussian((3, 4, 4)), eta=None)
    one.previews_every = 1
    winners = Winners(tmp_path, tmp_path, {}, {}, one.draw, True, {})
    problem = Problem(0, 0, one.grid, one.cost, 99)
    search = PromptSearch(problem, random_search(problem, RandomSearchConfig()), [])
    kept = {}
    [(_, first)] = one.run([(0, Trial(0, 0, Seeded(1), 4, "preview", 1))])
    back = Renoised(first.outcome.reached, 2, 7)
    [(_, second)] = one.run([(0, Trial(1, 1, back, 4, "preview", 7, 0))])
    [(_, other)] = one.run([(0, Trial(1, 2, Seeded(2), 4, "preview", 2, 0))])
    for number, result in enumerate((first, second, other)):
        winners.keep_previews(search, result)
        kept[number] = winners._previews(0, number)
    assert all([*cells] == [1, 2, 3, 4] for cells in kept.values())
    same = {
        k: [a == b for a, b in zip(kept[0].values(), kept[k].values(), strict=True)] for k in (1, 2)
    }
    assert same == {1: [True, True, False, False], 2: [True, False, False, False]}


def test_steps_between_previews_are_not_negative() -> None:
    with pytest.raises(UserError, match="previews.every=-1"):
        PreviewConfig(every=-1)
