"""clip_skip leaves out the last layers of the text encoder, as it does in diffusers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.config import MetricsConfig
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load
from tests.evaluations import arguments, evaluate, write_prompts
from tests.pixel_models import pixel_model
from tests.tiny_pipeline import make_tiny_pipeline

PROMPTS = ["a red one on a black background", "a blue two"]
LEADING = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
SETTINGS: dict[str, Any] = {"num_steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd"
    return make_tiny_pipeline(folder, text_encoder={"num_hidden_layers": 3}, scheduler=LEADING)


@pytest.mark.parametrize("clip_skip", [0, 1, 2, 3])
def test_pictures_equal_those_of_diffusers(checkpoint: Path, clip_skip: int) -> None:
    """There the negative prompt has all layers."""
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    encoder = pipeline.text_encoder  # diffusers 0.42 looks for the norm where transformers 4 had it
    encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    theirs = pipeline(
        PROMPTS,
        negative_prompt=["a white night"] * 2,
        num_inference_steps=3,
        guidance_scale=3.0,
        clip_skip=clip_skip,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="pt",
    ).images
    model = DiffusionModel.load(checkpoint)
    given = {**SETTINGS, "negative_prompt": "a white night", "clip_skip": clip_skip}
    ours = model.sample(PROMPTS, [3, 4], **given)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    plain = model.sample(PROMPTS, [3, 4], **{**given, "clip_skip": 0})
    assert ((ours - plain).abs().max() > 1e-3) == (clip_skip > 0)


@pytest.mark.parametrize("clip_skip", [-1, 4])
def test_more_layers_than_there_are_is_refused(checkpoint: Path, clip_skip: int) -> None:
    with pytest.raises(UserError, match=f"clip_skip={clip_skip} must be from 0 to 3"):
        DiffusionModel.load(checkpoint).sample("a one", [0], clip_skip=clip_skip)


def test_a_model_without_text_refuses_it() -> None:
    with pytest.raises(UserError, match="clip_skip=1: this model has no text encoder"):
        pixel_model("none").sample("", [0], clip_skip=1)


def search_config(checkpoint: Path, output: Path, *more: str) -> SearchConfig:
    prompts = json.dumps(PROMPTS)
    verifier = ["verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
    given = [f"checkpoint={checkpoint}", f"prompts={prompts}", f"output={output}"]
    sampling = ["num_steps=3", "guidance_scale=3", "guidance_rescale=0", "budget_nfe=12"]
    return load(SearchConfig, [*given, *sampling, *verifier, *more])


def test_a_search_samples_with_it_and_keeps_it(checkpoint: Path, tmp_path: Path) -> None:
    output, _ = search_to_folder(search_config(checkpoint, tmp_path / "out", "clip_skip=2"))
    assert json.loads((output / "search.json").read_text())["clip_skip"] == 2
    rows = [json.loads(line) for line in (output / "winners.jsonl").read_text().splitlines()]
    model = DiffusionModel.load(checkpoint)
    for row in rows:
        image = model.sample(row["prompt"], [row["seed"]], clip_skip=2, **SETTINGS)
        luminance = image.mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean()
        assert row["scores"]["dark"] == pytest.approx(-luminance.item(), abs=2e-2)
    with pytest.raises(UserError, match="clip_skip: 2 there, 0 now"):
        search_to_folder(search_config(checkpoint, output))
    with pytest.raises(UserError, match="clip_skip=9 must be from 0 to 3"):
        search_to_folder(search_config(checkpoint, tmp_path / "other", "clip_skip=9"))
    assert not (tmp_path / "other" / "search.json").exists()


def test_an_earlier_search_goes_on_without_it(checkpoint: Path, tmp_path: Path) -> None:
    output, _ = search_to_folder(search_config(checkpoint, tmp_path / "out"))
    settings = json.loads((output / "search.json").read_text())
    del settings["clip_skip"]
    (output / "search.json").write_text(json.dumps(settings))
    search_to_folder(search_config(checkpoint, output))


def test_an_evaluation_samples_with_it_and_keeps_it(checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    values = {}
    for clip_skip in (0, 2):
        output = tmp_path / str(clip_skip)
        given = arguments(checkpoint, prompts, output, f"clip_skip={clip_skip}")
        values[clip_skip] = evaluate(given).metrics
        assert json.loads((output / "evaluation.json").read_text())["clip_skip"] == clip_skip
    assert values[0] != values[2]
    with pytest.raises(UserError, match="clip_skip: 2 there, 0 now"):
        evaluate(arguments(checkpoint, prompts, tmp_path / "2"))
    with pytest.raises(UserError, match="clip_skip=4 must be"):
        evaluate(arguments(checkpoint, prompts, tmp_path / "new", "clip_skip=4"))
    assert load(MetricsConfig, given).clip_skip == 2


def test_the_verb_says_what_is_possible(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"checkpoint={checkpoint}", "prompts=a one", f"output={tmp_path / 'out'}"]
    assert main(["sample", *given, "clip_skip=4"]) == 2
    assert "clip_skip=4 must be from 0 to 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
