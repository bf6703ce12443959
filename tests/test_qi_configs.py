"""Qi et al. 2024 on SDXL-Turbo and SDXL: the arms of both sweeps in small, on tiny models."""

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import derive_seed, initial_noise
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.models import hpsv2
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load
from blackpoint.scripts.sweep.cells import Cell, cells_of
from blackpoint.scripts.sweep.config import SweepConfig
from blackpoint.scripts.sweep.costs import COLUMNS
from tests.test_verifiers_hpsv2 import SMALL, make_small_hpsv2
from tests.test_verifiers_image_reward import make_small_image_reward
from tests.tiny_sdxl import make_tiny_sdxl
from tests.tiny_vision import make_tiny_clip

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS = {
    "qi_sdxl_turbo": EulerAncestralDiscreteScheduler(**PUBLISHED, timestep_spacing="trailing"),
    "qi_sdxl": EulerDiscreteScheduler(**PUBLISHED, timestep_spacing="leading"),
}
ARMS = ("one_image", "noise_selection", "least_stable_noise", "noise_optimisation")
JUDGES = {"HPSv2", "aesthetic", "PickScore", "ImageReward"}
PROMPTS = ["a red one on a black background", "a blue two"]
NFE = {"qi_sdxl_turbo": 4 + 4, "qi_sdxl": 10 * 2 + 10}
"""Of an image and its inversion; guidance has two rows, the inversion none of it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SDXL of each scheduler, and the judges' small random models."""
    folder = tmp_path_factory.mktemp("qi")
    for name, scheduler in SCHEDULERS.items():
        make_tiny_sdxl(folder / name, scheduler=scheduler)
    (folder / "reward").mkdir()
    make_small_image_reward(folder / "reward")
    make_small_hpsv2(folder)
    make_tiny_clip(folder / "clip", folder / "qi_sdxl" / "tokenizer")
    torch.save({"weight": torch.ones(1, 24), "bias": torch.zeros(1)}, folder / "head.pth")
    return folder


@cache
def sweep_of(name: str, *overrides: str) -> list[Cell]:
    return cells_of(load(SweepConfig, [str(ROOT / "configs" / f"{name}.yaml"), *overrides]))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_arm_of_three_noises_for_a_hundred_ends_where_it_should(
    name: str, arm: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every arm starts from the noise of the plain image, so that the order of their stabilities
    follows whatever the model, but for the rounding of choices to 1e-4."""
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", SMALL)
    checkpoints = {
        "checkpoint": place / name,
        "held_out.HPSv2.checkpoint": place / "HPS.pt",
        "held_out.aesthetic.checkpoint": place / "head.pth",
        "held_out.aesthetic.base": place / "clip",
        "held_out.PickScore.checkpoint": place / "clip",
        "held_out.ImageReward.checkpoint": place / "reward",
    }
    given = [f"search.{key}={path}" for key, path in checkpoints.items()]
    cell = next(c for c in sweep_of(name, *given) if c.arm == arm)
    config = cell.configs["search"]
    count = config.budget_nfe // NFE[name]
    assert count == (1 if arm == "one_image" else 100)
    count = min(count, 3)
    changes = {"budget_nfe": count * NFE[name], "batch_size": 8, "device": "cpu"}
    output, _ = search_to_folder(
        replace(config, output=str(tmp_path / "out"), prompts=PROMPTS, **changes)
    )
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["nfe"] == 2 * count * NFE[name] and ledger["beside"]["nfe"] == 0
    assert ledger["decoded_images"] == 2 * count
    for line in (output / "winners.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        plain = row["baseline"]
        assert plain["seed"] == derive_seed(0, row["prompt_index"], "candidate", 0) >> 32
        assert row["held_out"].keys() == plain["held_out"].keys() == JUDGES
        assert all(math.isfinite(score) for score in row["held_out"].values())
        stability, before = row["scores"]["stability"], plain["scores"]["stability"]
        assert -1 <= stability < 1
        gain = before - stability if arm == "least_stable_noise" else stability - before
        assert gain >= -1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_cost_of_the_published_sizes_is_printed_and_nothing_is_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """300 prompts; 100 noises or steps of an image and its inversion; four judges of two images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    texts = [f"prompt {number}" for number in range(200)]
    Path("prompts/pick_a_pic.txt").write_text("\n".join(texts[:100]))
    Path("prompts/drawbench.csv").write_text("\n".join(["Prompts", *texts]))
    assert main(["sweep", str(ROOT / "configs" / f"{name}.yaml"), "plan=true"]) == 0
    start = "arm  "
    out = capsys.readouterr().out
    lines = out[out.index(start) :].partition("\n\n")[0].splitlines()
    table = [re.split(r" {2,}", line.strip()) for line in lines if not line.startswith("--")]
    assert tuple(table[0]) == COLUMNS
    one = NFE[name]
    found = {arm: [*map(int, numbers)] for arm, *numbers in table[2:]}
    assert found == {
        "one_image": [2, one, 300, 300 * one, 300, 300, 0, 2400],
        "noise_selection": [2, 100 * one, 300, 30_000 * one, 30_000, 30_000, 0, 2400],
        "least_stable_noise": [2, 100 * one, 300, 30_000 * one, 30_000, 60_000, 0, 2400],
        "noise_optimisation": [2, 100 * one, 300, 30_000 * one, 30_000, 30_000, 0, 2400],
    }
    in_all = dict(zip(COLUMNS, table[1], strict=True))
    assert in_all["arm"] == "in all" and in_all["NFE"] == str(90_300 * one)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_absent_prompts_are_named_with_where_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(ROOT / "configs" / f"{name}.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("prompts=prompts/pick_a_pic.txt: no such file") == 1
    assert error.count("prompts=prompts/drawbench.csv: no such file") == 1
    assert "yuvalkirstain/pickapic_v1" in error and "imagen.research.google" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_turbo_run_is_inverted_ever_better_by_more_iterations(
    place: Path, num_steps: int
) -> None:
    """eps-prediction, trailing, at SNR 0.0047: one iteration misses the noise, sixteen come
    back to it but for the rounding of latents of 1 / 0.068 in float32, some 1e-6 a step."""
    model = DiffusionModel.load(place / "qi_sdxl_turbo")
    grid = model.process.grid(num_steps, "ddim")
    noise = initial_noise([3, 4], model.latent_shape())
    with torch.no_grad():
        denoise = model.denoiser(model.encode_prompts(PROMPTS))
        x = run("ddim", denoise, grid, SampleState(noise)).x
        errors = []
        for count in (1, 4, 16):
            inverter = Inverter("fixed_point", count).of(model.process)
            back = invert(denoise, grid, x, inverter).x
            errors.append(((back - noise).norm() / noise.norm()).item())
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-4
