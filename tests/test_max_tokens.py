"""max_tokens samples longer texts in every verb that samples, and is kept with the results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load
from tests.evaluations import arguments, evaluate, write_prompts
from tests.test_sdxl_model import ZERO_SNR
from tests.tiny_pipeline import NUM_TOKENS, make_tiny_pipeline
from tests.tiny_sdxl import make_tiny_sdxl

ROOM = NUM_TOKENS - 2
WORDS = ["a", "red", "one", "two", "blue"]
BEGIN, REST = (" ".join(WORDS[i % 5] for i in range(*span)) for span in ((0, ROOM), (ROOM, 20)))
LONG = f"{BEGIN} {REST}"
"""One whole chunk and six words of another."""
NEGATIVE = "a white night"
SETTINGS: dict[str, Any] = {"num_steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, config = tmp_path_factory.mktemp("model"), ZERO_SNR.to_diffusers()
    return {
        "sd": make_tiny_pipeline(root / "sd", scheduler=config),
        "sdxl": make_tiny_sdxl(root / "sdxl", scheduler=DDIMScheduler.from_config(config)),
    }


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pictures_are_those_of_the_stock_pipeline_with_the_chunks(
    folders: dict[str, Path], kind: str
) -> None:
    """It takes embeddings: chunks one after the other, pooled of the first; empty ones behind."""
    given: dict[str, Any] = {}
    if kind == "sd":
        stock = StableDiffusionPipeline.from_pretrained(folders[kind], safety_checker=None)
        rows = stock.encode_prompt([BEGIN, REST, NEGATIVE, ""], "cpu", 1, False)[0]
    else:
        stock = StableDiffusionXLPipeline.from_pretrained(folders[kind], add_watermarker=False)
        texts = [BEGIN, REST, NEGATIVE, ""]
        rows, _, pooled, _ = stock.encode_prompt(texts, do_classifier_free_guidance=False)
        given = {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[2:3]}
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt_embeds=torch.cat([*rows[:2]])[None],
        negative_prompt_embeds=torch.cat([*rows[2:]])[None],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **given,
    ).images
    model = DiffusionModel.load(folders[kind])
    settings = SETTINGS | {"negative_prompt": NEGATIVE, "num_steps": 4}
    ours = model.sample(LONG, [3], max_tokens=2 * ROOM, **settings)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - model.sample(LONG, [3], **settings)).abs().max() > 1e-3


def test_sample_keeps_it_and_goes_on_with_folders_from_before(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"checkpoint={folders['sd']}", f"prompts={LONG}", "num_steps=1"]
    chunks = [*given, f"output={tmp_path / 'chunks'}", f"max_tokens={2 * ROOM}"]
    assert main(["sample", *chunks]) == 0
    assert json.loads((tmp_path / "chunks" / "sample.json").read_text())["max_tokens"] == 2 * ROOM
    assert main(["sample", *chunks[:-1]]) == 2
    assert f"max_tokens: {2 * ROOM} there, None now" in capsys.readouterr().err
    plain = [*given, f"output={tmp_path / 'plain'}"]
    assert main(["sample", *plain]) == 0
    record = tmp_path / "plain" / "sample.json"
    settings = json.loads(record.read_text())
    del settings["max_tokens"]
    record.write_text(json.dumps(settings))
    assert main(["sample", *plain, "num_images=1"]) == 0
    assert main(["sample", *given, f"output={tmp_path / 'wrong'}", "max_tokens=75"]) == 2
    assert f"max_tokens=75 must be a multiple of {ROOM}" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_a_search_samples_with_it_and_keeps_it(folders: dict[str, Path], tmp_path: Path) -> None:
    def config(output: Path, *more: str) -> SearchConfig:
        texts = json.dumps([LONG, "a one"])
        given = [f"checkpoint={folders['sdxl']}", f"prompts={texts}", f"output={output}"]
        sampling = ["num_steps=3", "guidance_scale=3", "guidance_rescale=0", "budget_nfe=12"]
        verifier = ["verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
        return load(SearchConfig, [*given, *sampling, *verifier, *more])

    chunks = f"max_tokens={2 * ROOM}"
    output, _ = search_to_folder(config(tmp_path / "out", chunks))
    assert json.loads((output / "search.json").read_text())["max_tokens"] == 2 * ROOM
    model = DiffusionModel.load(folders["sdxl"])
    for line in (output / "winners.jsonl").read_text().splitlines():
        row = json.loads(line)
        image = model.sample(row["prompt"], [row["seed"]], max_tokens=2 * ROOM, **SETTINGS)
        luminance = image.mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean()
        assert row["scores"]["dark"] == pytest.approx(-luminance.item(), abs=2e-2)
    with pytest.raises(UserError, match=f"max_tokens: {2 * ROOM} there, None now"):
        search_to_folder(config(output))
    with pytest.raises(UserError, match="max_tokens=20 must be a multiple"):
        search_to_folder(config(tmp_path / "other", "max_tokens=20"))
    assert not (tmp_path / "other" / "search.json").exists()


def test_an_evaluation_samples_with_it_and_keeps_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": LONG}) + "\n")
    values = {}
    for name, more in (("plain", []), ("chunks", [f"max_tokens={2 * ROOM}"])):
        values[name] = evaluate(arguments(folders["sd"], prompts, tmp_path / name, *more)).metrics
        kept = json.loads((tmp_path / name / "evaluation.json").read_text())["max_tokens"]
        assert kept == (2 * ROOM if more else None)
    assert values["plain"] != values["chunks"]
    with pytest.raises(UserError, match=f"max_tokens: {2 * ROOM} there, None now"):
        evaluate(arguments(folders["sd"], prompts, tmp_path / "chunks"))
    with pytest.raises(UserError, match="max_tokens=20 must be a multiple"):
        evaluate(arguments(folders["sd"], prompts, tmp_path / "new", "max_tokens=20"))
