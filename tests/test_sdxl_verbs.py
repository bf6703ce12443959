"""The verbs on a tiny SDXL: sample, search with an inverting verifier, evaluate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch.testing import assert_close

from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load
from tests.evaluations import arguments, evaluate, write_prompts
from tests.test_sdxl_model import ZERO_SNR
from tests.tiny_sdxl import make_tiny_sdxl

PROMPT = "a red one on a black background"
HALF_A_LEVEL = 0.6 / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "sdxl"
    return make_tiny_sdxl(place, scheduler=DDIMScheduler.from_config(ZERO_SNR.to_diffusers()))


def picture(path: Path) -> torch.Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def test_sample_writes_the_pictures_of_the_model(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = [f"checkpoint={folder}", f"prompts={PROMPT}", f"output={output}", "num_steps=3"]
    assert main(["sample", *given, "height=16", "width=24", "num_images=2"]) == 0
    model = DiffusionModel.load(folder)
    expected = model.sample(PROMPT, [0, 1], num_steps=3, height=16, width=24)
    for seed in (0, 1):
        found = picture(output / "images" / f"0_{seed}.png")
        assert_close(found, expected[seed], rtol=0, atol=HALF_A_LEVEL)


def test_a_search_inverts_its_candidates_and_a_winner_is_made_again(
    folder: Path, tmp_path: Path
) -> None:
    """Stability: from the image back to its noise by fixed points, on latents of SDXL."""
    config = load(
        SearchConfig,
        [
            *(f"checkpoint={folder}", f"prompts={PROMPT}", f"output={tmp_path / 'out'}"),
            *("num_steps=3", "guidance_scale=1", "budget_nfe=40"),
            *("verifiers.stable.kind=stability", "verifiers.dark.kind=luminance"),
            "verifiers.dark.target=0",
        ],
    )
    output, _ = search_to_folder(config)
    rows = [json.loads(line) for line in (output / "candidates.jsonl").read_text().splitlines()]
    assert len({row["scores"]["stable"] for row in rows}) == len(rows) > 1
    winner = json.loads((output / "winners.jsonl").read_text())
    model = DiffusionModel.load(folder)
    again = model.sample(PROMPT, [winner["seed"]], num_steps=3, guidance_scale=1.0)[0]
    assert_close(picture(output / winner["image"]), again, rtol=0, atol=HALF_A_LEVEL)


def test_an_evaluation_measures_it(folder: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    summary = evaluate(arguments(folder, prompts, tmp_path / "out"))
    assert len(summary.metrics) > 3
