"""`blackpoint search` on a tiny pipeline: what it leaves, resume, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import blackpoint.sampling.search.run
from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.scripts.cli import main

SELF = VerifierConfig(kind="self_supervised", checkpoint="features")
ORACLE = VerifierConfig(kind="oracle", checkpoint="features", metric="is")
PROMPTS = ["a red photo of snow", "a blue night"]


def config(pipeline: Path, output: Path, **changes: Any) -> SearchConfig:
    settings: dict[str, Any] = {
        "checkpoint": str(pipeline),
        "prompts": PROMPTS,
        "output": str(output),
        "budget_nfe": 24,
        "num_steps": 4,
        "guidance_scale": 1.0,
        "verifiers": {"dark": VerifierConfig(kind="luminance", target=0.0)},
        "held_out": {
            "border": VerifierConfig(kind="luminance", target=0.0, where="border"),
        },
    }
    return SearchConfig(**(settings | changes))


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def image_of(folder: Path, row: dict[str, Any]) -> torch.Tensor:
    """Reads a winner's picture as (3, H, W) in [0, 1]."""
    pixels = np.asarray(Image.open(folder / row["image"]).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def test_a_random_winner_is_made_again_from_its_seed(pipeline: Path, tmp_path: Path) -> None:
    output, _ = search_to_folder(config(pipeline, tmp_path / "out"))
    winners = rows(output, "winners.jsonl")
    assert [row["prompt"] for row in winners] == PROMPTS
    model = DiffusionModel.load(pipeline)
    for row in winners:
        mine = [
            each
            for each in rows(output, "candidates.jsonl")
            if each["prompt_index"] == row["prompt_index"]
        ]
        assert len(mine) == 6 and row["nfe"] == 24
        assert row["score"] == max(each["score"] for each in mine)
        again = model.sample(
            row["prompt"], seeds=[row["seed"]], num_steps=4, guidance_scale=1.0, batch_size=1
        )[0]
        assert_close(image_of(output, row), again, rtol=0, atol=0.6 / 255)
        picture = Image.open(output / row["image"])
        about = json.loads(picture.text["blackpoint"])  # type: ignore[attr-defined]
        assert about["seed"] == row["seed"] and about["num_steps"] == 4
        assert (output / "images" / f"{row['prompt_index']:06d}.sheet.png").is_file()
        assert set(row["held_out"]) == {"border"}
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["nfe"] == ledger["conditional_rows"] == 48
    assert {path.name for path in output.iterdir()} == {
        "candidates.jsonl",
        "winners.jsonl",
        "images",
        "ledger.json",
        "search.json",
        "hacking.json",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "zero_order"},
        {"algorithm": "paths"},
        {"algorithm": "halving"},
        {"algorithm": "fk_steering", "sampler": "euler_ancestral"},
    ],
    ids=lambda changes: changes["algorithm"],
)
def test_every_algorithm_finds_a_winner_inside_its_budget(
    changes: dict[str, Any], pipeline: Path, tmp_path: Path
) -> None:
    output, _ = search_to_folder(config(pipeline, tmp_path / "out", **changes))
    winners = rows(output, "winners.jsonl")
    assert len(winners) == 2 and all(row["nfe"] <= 24 for row in winners)
    if changes["algorithm"] == "zero_order":
        for row in winners:
            noise = output / "images" / f"{row['prompt_index']:06d}.noise.safetensors"
            assert noise.is_file() == (row["seed"] is None)
            if row["seed"] is None:
                assert load_file(noise)["noise"].shape == (4, 8, 8)


@pytest.mark.parametrize("algorithm", ["halving", "paths"])
def test_one_step_leaves_nothing_to_look_at(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"num_steps=1: algorithm={algorithm} .* at least 2"):
        config(tmp_path, tmp_path / "out", algorithm=algorithm, num_steps=1)


def test_a_start_beside_one_that_ends_meanwhile_adds_nothing(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(pipeline, tmp_path / "out")
    load, found = blackpoint.sampling.search.run.load, dict[str, bytes]()

    def contents() -> dict[str, bytes]:
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in files if path.suffix != ".log"}

    def beside_another(*arguments: Any) -> Any:
        monkeypatch.setattr(blackpoint.sampling.search.run, "load", load)
        search_to_folder(asked)
        found.update(contents())
        return load(*arguments)

    monkeypatch.setattr(blackpoint.sampling.search.run, "load", beside_another)
    search_to_folder(asked)
    assert contents() == found


def test_a_raised_budget_finds_what_it_would_have_from_the_start(
    pipeline: Path, tmp_path: Path
) -> None:
    """Candidates alike but for seconds, to the rounding of images in other batches."""
    small = config(pipeline, tmp_path / "out", budget_nfe=12)
    output, _ = search_to_folder(small)
    assert search_to_folder(replace(small, budget_nfe=24))[0] == output
    whole, _ = search_to_folder(config(pipeline, tmp_path / "whole"))
    for name in ("candidates.jsonl", "winners.jsonl"):
        raised, expected = rows(output, name), rows(whole, name)
        assert len(raised) == len(expected)
        for one, other in zip(raised, expected, strict=True):
            found, wanted = flat(one), flat(other)
            for key in wanted:
                if key.partition(".")[0] not in ("seconds", "spent"):
                    assert found[key] == pytest.approx(wanted[key], abs=2e-4), key
    for row in rows(whole, "winners.jsonl"):
        pictures = (image_of(folder, row) for folder in (output, whole))
        assert_close(*pictures, rtol=0, atol=1.1 / 255)
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (output, whole)]
    assert ledgers[0]["nfe"] == ledgers[1]["nfe"] == 48
    assert json.loads((output / "search.json").read_text())["budget_nfe"] == 24


def test_other_weights_under_the_same_name_are_refused(pipeline: Path, tmp_path: Path) -> None:
    """A raised budget mixed candidates of two models; its refusal leaves the winners there."""
    folder = tmp_path / "model"
    shutil.copytree(pipeline, folder)
    small = config(folder, tmp_path / "out", budget_nfe=12)
    output, _ = search_to_folder(small)
    before = (output / "winners.jsonl").read_bytes()
    [path] = (folder / "unet").glob("*.safetensors")
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="has other weights, or another process, than output="):
        search_to_folder(replace(small, budget_nfe=24))
    assert (output / "winners.jsonl").read_bytes() == before
    assert (output / "hacking.json").is_file()


def drifting(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Scores all images alike, with another rounding in a batch of more than three."""
    return torch.full((len(images),), 0.5 - 3e-4 * (len(images) > 3))


def test_scores_stand_where_images_are_made_again(pipeline: Path, tmp_path: Path) -> None:
    """The first image led; made again in another batch, it fell behind ones without an image."""
    flat_scores = VerifierConfig(kind="custom", module=f"{__name__}:drifting")
    settings = {"prompts": PROMPTS[:1], "verifiers": {"flat": flat_scores}, "budget_nfe": 12}
    small = config(pipeline, tmp_path / "out", **settings)
    output, _ = search_to_folder(small)
    search_to_folder(replace(small, budget_nfe=24))
    scores = [row["score"] for row in rows(output, "candidates.jsonl")]
    assert scores == pytest.approx([0.5] * 3 + [0.4997] * 3)
    assert [row["candidate"] for row in rows(output, "winners.jsonl")] == [0]


@pytest.mark.parametrize(
    "changes, budget_nfe, reason",
    [
        ({}, 12, "a budget can only grow"),
        ({"algorithm": "zero_order"}, 48, "plans by its budget, unlike random"),
    ],
)
def test_another_budget_that_cannot_go_on_is_refused(
    changes: dict[str, Any], budget_nfe: int, reason: str, pipeline: Path, tmp_path: Path
) -> None:
    begun = config(pipeline, tmp_path / "out", prompts=PROMPTS[:1], **changes)
    output, _ = search_to_folder(begun)
    before = (output / "winners.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"budget_nfe: 24 there, {budget_nfe} now; .*{reason}"):
        search_to_folder(replace(begun, budget_nfe=budget_nfe))
    assert (output / "winners.jsonl").read_bytes() == before
    assert (output / "hacking.json").is_file()


def test_several_verifiers_rank_together(pipeline: Path, tmp_path: Path) -> None:
    both = {
        "dark": VerifierConfig(kind="luminance", target=0.0),
        "half": VerifierConfig(kind="luminance", target=0.5, weight=2.0),
    }
    output, _ = search_to_folder(config(pipeline, tmp_path / "out", verifiers=both))
    for row in rows(output, "candidates.jsonl"):
        assert row["score"] == pytest.approx(
            row["scores"]["dark"] + 2 * row["scores"]["half"], abs=1e-4
        )
    assert len(rows(output, "winners.jsonl")) == 2


def test_the_same_command_continues_and_another_is_refused(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = search_to_folder(config(pipeline, tmp_path / "whole"))
    from blackpoint.sampling.search import journal

    class Killed(Exception):
        pass

    written = 0
    original = journal.Journal.write

    def write(self: Any, *arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise Killed
        original(self, *arguments)

    broken = config(pipeline, tmp_path / "broken", batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(journal.Journal, "write", write)
        search_to_folder(broken)
    assert len(rows(tmp_path / "broken", "candidates.jsonl")) == 4
    search_to_folder(broken)
    for name in ("winners.jsonl", "candidates.jsonl"):
        one, two = (rows(folder, name) for folder in (whole, tmp_path / "broken"))
        keys = [(row["prompt_index"], row["candidate"], row["score"]) for row in one]
        assert sorted(keys) == sorted((r["prompt_index"], r["candidate"], r["score"]) for r in two)
    before = (tmp_path / "broken" / "winners.jsonl").read_bytes()
    search_to_folder(broken)  # finished: nothing to do
    assert (tmp_path / "broken" / "winners.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="other settings .num_steps: 4 there, 5 now"):
        search_to_folder(config(pipeline, tmp_path / "broken", num_steps=5))


def test_a_folder_of_another_version_is_continued_where_it_means_the_same(
    pipeline: Path, tmp_path: Path
) -> None:
    output, _ = search_to_folder(config(pipeline, tmp_path / "out"))
    path = output / "search.json"
    saved = json.loads(path.read_text())
    del saved["ensemble"], saved["verifiers"]["dark"]["output"]
    path.write_text(json.dumps(saved))
    search_to_folder(config(pipeline, output))  # what is missing has its default
    path.write_text(json.dumps(saved | {"luck": 7}))
    with pytest.raises(UserError, match="another version .Key 'luck' not in 'SearchConfig'"):
        search_to_folder(config(pipeline, output))


def test_a_folder_that_holds_something_else_is_refused(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no search"):
        search_to_folder(config(pipeline, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"verifiers": {}}, "verifiers is empty: name one to search with"),
        ({"held_out": {"dark": VerifierConfig(kind="luminance", target=1.0)}}, "held_out.dark"),
        ({"algorithm": "fk_steering"}, "would stay copies without noise"),
        ({"budget_nfe": 0}, "budget_nfe=0"),
        ({"held_out": {"own": SELF}}, "held_out.own: kind=self_supervised"),
        ({"verifiers": {"own": SELF}, "algorithm": "paths"}, "needs whole runs"),
        ({"held_out": {"set": ORACLE}}, "held_out.set: kind=oracle"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        config(tmp_path, tmp_path / "out", **changes)


def test_the_command_line_refuses_a_budget_below_one_image(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"checkpoint={pipeline}",
        "prompts=a red photo",
        f"output={tmp_path / 'out'}",
        "budget_nfe=7",
        "num_steps=4",
        "verifiers.dark.kind=luminance",
        "verifiers.dark.target=0",
    ]
    assert main(["search", *arguments]) == 2
    error = capsys.readouterr().err
    assert "budget_nfe=7 is smaller than one image, which takes 8 NFE" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert main(["search", "--help"]) == 0
    assert "halving.min_kendall" in capsys.readouterr().out


def test_an_image_of_a_winner_is_what_was_painted(tmp_path: Path) -> None:
    pixels = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    image = image_of(tmp_path, {"image": "a.png"})
    assert_close(image, pixels.permute(2, 0, 1).float() / 255)
