"""What a search says of its own winners: plain images, held-out verifiers, diversity, the alarm."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.report.page import Gallery, Section
from blackpoint.sampling.report.search_page import search_section
from blackpoint.sampling.runtime.tracking import WandbConfig
from blackpoint.sampling.search import judge
from blackpoint.sampling.search.algorithms.fk_steering import FkSteeringConfig
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig
from blackpoint.sampling.search.calibration import find_batch_size
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.statistics.table import Table
from blackpoint.sampling.verifiers.load import ImageModelConfig, VerifierConfig, load_verifiers
from blackpoint.sampling.verifiers.models import clip
from blackpoint.scripts.verbs.report_config import ReportConfig
from blackpoint.scripts.verbs.report_content import write
from tests.search_problems import runner
from tests.tiny_vision import make_tiny_clip

PROMPTS = ["a red photo of snow", "a blue night", "a white wall", "a gray sea", "a black cat", "x"]
DARK = VerifierConfig(kind="luminance", target=0.0)
BRIGHT = VerifierConfig(kind="luminance", target=1.0)


def numbers(section: Section) -> list[Any]:
    return [row for part in section.content if isinstance(part, Table) for row in part.rows]


def search_config(pipeline: Path, output: Path, **changes: Any) -> SearchConfig:
    settings: dict[str, Any] = {
        "checkpoint": str(pipeline),
        "prompts": PROMPTS,
        "output": str(output),
        "budget_nfe": 48,
        "num_steps": 4,
        "guidance_scale": 1.0,
        "verifiers": {"dark": DARK},
        "held_out": {"bright": BRIGHT},
    }
    return SearchConfig(**(settings | changes))


def search(pipeline: Path, output: Path, **changes: Any) -> list[str]:
    return search_to_folder(search_config(pipeline, output, **changes))[1]


def winners(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "winners.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["random", "paths"])
def test_a_hacked_verifier_sets_off_the_alarm(
    algorithm: str, pipeline: Path, tmp_path: Path
) -> None:
    """Who searches for dark images finds images that a judge of brightness likes less."""
    lines = search(pipeline, tmp_path / "out", algorithm=algorithm)
    assert any(line.startswith("hacking: dark rises by") for line in lines), lines
    assert any("while held-out bright falls by" in line for line in lines)
    [alarm] = json.loads((tmp_path / "out" / "hacking.json").read_text())
    assert alarm["raised"] and set(alarm["changes"]) == {"dark", "bright", "diversity"}
    model = DiffusionModel.load(pipeline)
    for row in winners(tmp_path / "out"):
        plain = row["baseline"]
        assert row["held_out"]["bright"] == pytest.approx(-1 - row["scores"]["dark"], abs=1e-5)
        again = model.sample(row["prompt"], [plain["seed"]], num_steps=4, guidance_scale=1.0)[0]
        assert plain["scores"]["dark"] == pytest.approx(-luminance(again), abs=1e-4)
        assert plain["held_out"]["bright"] == pytest.approx(luminance(again) - 1, abs=1e-4)
        with Image.open(tmp_path / "out" / plain["image"]) as picture:
            pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
        assert_close(pixels, again, rtol=0, atol=0.6 / 255)
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    beside = len(PROMPTS) * 4 if algorithm == "paths" else 0
    assert ledger["beside"]["nfe"] == beside
    assert ledger["nfe"] == sum(row["nfe"] for row in winners(tmp_path / "out"))


def luminance(image: torch.Tensor) -> float:
    from blackpoint.sampling.pixels.luminance import image_luminance

    return float(image_luminance(image[None]))


def test_an_oracle_searches_one_prompt_after_the_other(pipeline: Path, tmp_path: Path) -> None:
    """Of images that are alike IS is 1: what adds most is unlike the winners before."""
    module = {"module": "tests.test_search_judgement:Brightness"}
    oracle = VerifierConfig(kind="oracle", metric="is", **module)
    search(pipeline, tmp_path / "out", verifiers={"set": oracle}, held_out={})
    scores: dict[int, float] = {}
    for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines():
        row = json.loads(line)
        index = row["prompt_index"]
        scores[index] = max(scores.get(index, -9.0), row["score"])
        assert index == max(scores), "a prompt began before the one before it was finished"
    rows = winners(tmp_path / "out")
    assert [row["score"] for row in rows] == [scores[index] for index in range(len(PROMPTS))]
    assert rows[0]["score"] == 0 and any(row["score"] > 0 for row in rows[1:])


class Brightness(torch.nn.Module):
    """Two logits that tell bright images from dark ones."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = 40 * (images.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([light, -light], dim=1)


@pytest.mark.slow
def test_features_of_the_users_own_tell_the_diversity(pipeline: Path, tmp_path: Path) -> None:
    own = ImageModelConfig(module="tests.test_search_judgement:Brightness")
    search(pipeline, tmp_path / "own", diversity=own)
    search(pipeline, tmp_path / "pixels")
    found = [
        json.loads((tmp_path / name / "hacking.json").read_text())[0]["changes"]["diversity"]
        for name in ("own", "pixels")
    ]
    assert found[0]["value"] != pytest.approx(found[1]["value"], abs=1e-6)


@pytest.mark.slow
def test_a_batch_size_that_is_found_changes_no_choice(pipeline: Path, tmp_path: Path) -> None:
    one = runner(1)
    size = find_batch_size(one, 0)
    assert 1 <= size <= 128 and one.ledger.nfe == 0
    for name, size in (("found", 0), ("given", 3)):
        search(pipeline, tmp_path / name, batch_size=size)
    keys = ("prompt_index", "candidate", "seed", "score")
    found, given = (
        [[row[key] for key in keys] for row in winners(tmp_path / name)]
        for name in ("found", "given")
    )
    assert sorted(found) == sorted(given)


def test_memory_that_ends_bounds_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner(1)
    monkeypatch.setattr("blackpoint.sampling.search.calibration.LEAST_GAIN", 0.0)

    def rehearse(batch: list[Any]) -> None:
        if len(batch) > 16:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(one, "rehearse", rehearse)
    assert find_batch_size(one, 0) == 8


@pytest.mark.slow
def test_draws_belong_to_a_prompt_wherever_a_part_begins(pipeline: Path, tmp_path: Path) -> None:
    search(pipeline, tmp_path / "all")
    search(pipeline, tmp_path / "part", offset=2, limit=2)
    by_index = {row["prompt_index"]: row for row in winners(tmp_path / "all")}
    part = winners(tmp_path / "part")
    assert [row["prompt_index"] for row in part] == [2, 3]
    for row in part:
        assert row["seed"] == by_index[row["prompt_index"]]["seed"]


def test_a_prompt_that_a_verifier_cannot_judge_is_refused_at_the_start(
    pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="names no luminance"):
        search(pipeline, tmp_path / "out", verifiers={"tone": VerifierConfig(kind="luminance")})
    assert not (tmp_path / "out").exists()


def test_verifiers_of_one_folder_share_its_weights(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = str(make_tiny_clip(tmp_path, pipeline / "tokenizer")), []
    original = clip.Clip
    monkeypatch.setattr(clip, "Clip", lambda *given: made.append(given) or original(*given))
    kinds = ("clip_score", "pick_score")
    configs = {kind: VerifierConfig(kind=kind, checkpoint=folder) for kind in kinds}
    for count in (1, 2):  # once a call
        assert load_verifiers(configs, torch.device("cpu")).keys() == configs.keys()
        assert len(made) == count


def test_winners_and_changes_are_tables_at_wandb(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    search(pipeline, tmp_path / "out", wandb=WandbConfig(project="tests"))
    [run] = (tmp_path / "out" / "wandb").glob("offline-run-*")
    tables = {path.name.split("_")[0]: path for path in run.glob("files/media/table/*.json")}
    assert set(tables) == {"winners", "changes"}
    table = json.loads(tables["winners"].read_text())
    assert len(table["data"]) == len(PROMPTS)
    assert {"prompt", "winner", "plain", "held-out bright", "dark"} <= set(table["columns"])


@pytest.mark.slow
def test_a_file_of_many_prompts_is_searched_from_its_first(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are encoded as their turn comes, so that memory and time do not go into all."""
    path = tmp_path / "many.txt"
    path.write_text("".join(f"photo number {n}\n\n" for n in range(200_000)))
    encoded = 0
    original = DiffusionModel.encode_prompts

    def counting(self: DiffusionModel, prompts: list[str], *more: Any, **given: Any) -> Any:
        nonlocal encoded
        encoded += len(prompts)
        if encoded > 60:
            raise KeyboardInterrupt
        return original(self, prompts, *more, **given)

    monkeypatch.setattr(DiffusionModel, "encode_prompts", counting)
    with pytest.raises(KeyboardInterrupt):
        search(pipeline, tmp_path / "out", prompts=str(path), held_out={}, batch_size=24)
    assert len(winners(tmp_path / "out")) > 5


def test_the_report_of_a_search_shows_plain_images_above_winners(
    pipeline: Path, tmp_path: Path
) -> None:
    search(pipeline, tmp_path / "out")
    section = search_section(tmp_path / "out")
    assert section is not None
    gallery = next(part for part in section.content if isinstance(part, Gallery))
    assert [name for name, _ in gallery.content] == ["first seed", "winner"]
    assert [len(pictures) for _, pictures in gallery.content] == [len(PROMPTS)] * 2
    by_name = {row["mean score"]: (row["first seed"], row["winner"]) for row in numbers(section)}
    plain, winner = by_name["dark (searched)"]
    assert winner > plain and by_name["bright (held out)"][1] < by_name["bright (held out)"][0]
    page = write(ReportConfig(run_dir=str(tmp_path / "out"))).read_text(encoding="utf-8")
    assert "Search over noise" in page and "hacking: dark rises by" in page
    assert search_section(tmp_path) is None


def test_prompts_that_changed_are_refused(pipeline: Path, tmp_path: Path) -> None:
    """Rows belong to texts, not to places in a file that was edited since."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red photo\na blue night\n")
    search(pipeline, tmp_path / "out", prompts=str(path))
    path.write_text("a new one\na red photo\na blue night\n")
    with pytest.raises(UserError, match="holds a search of other prompts"):
        search(pipeline, tmp_path / "out", prompts=str(path))


def test_features_that_cannot_be_loaded_are_refused_at_the_start(
    pipeline: Path, tmp_path: Path
) -> None:
    wrong = ImageModelConfig(checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="diversity.checkpoint"):
        search(pipeline, tmp_path / "out", diversity=wrong)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="a verifier is called diversity"):
        search(pipeline, tmp_path / "out", held_out={"diversity": BRIGHT})


def test_a_plain_image_without_score_leaves_its_prompt_without_baseline(
    pipeline: Path, tmp_path: Path
) -> None:
    verifiers = {"odd": VerifierConfig(kind="custom", module="tests.search_problems:sometimes")}
    search(pipeline, tmp_path / "out", algorithm="paths", verifiers=verifiers)
    found = [row["baseline"] for row in winners(tmp_path / "out")]
    assert None in found and any(found)
    assert search_section(tmp_path / "out") is not None


def test_a_held_out_score_that_is_never_finite_is_left_out_of_the_page(
    pipeline: Path, tmp_path: Path
) -> None:
    judge = {"never": VerifierConfig(kind="custom", module="tests.search_problems:never")}
    search(pipeline, tmp_path / "out", held_out=judge)
    section = search_section(tmp_path / "out")
    assert section is not None
    assert not any("never" in row["mean score"] for row in numbers(section))


def test_a_budget_that_does_not_pay_for_a_looks_scores_is_refused(
    pipeline: Path, tmp_path: Path
) -> None:
    """Halving by stability pays for an inversion at every look: 4 steps cost more than 8 NFE."""
    stable = {"stable": VerifierConfig(kind="stability")}
    with pytest.raises(UserError, match="budget_nfe=9 is smaller than one image, which takes 14"):
        search(
            pipeline,
            tmp_path / "out",
            algorithm="halving",
            verifiers=stable,
            budget_nfe=9,
            held_out={},
        )
    assert not (tmp_path / "out").exists()


def test_an_oracle_beside_plain_images_is_refused_where_they_come_first(
    pipeline: Path, tmp_path: Path
) -> None:
    module = {"module": "tests.test_search_judgement:Brightness"}
    oracle = VerifierConfig(kind="oracle", metric="is", **module)
    with pytest.raises(UserError, match="would be scored with another set"):
        search(pipeline, tmp_path / "out", algorithm="paths", verifiers={"set": oracle})


def test_the_plain_image_has_the_first_seed_of_the_algorithm(
    pipeline: Path, tmp_path: Path
) -> None:
    """random.first_seed is of best-of-N alone, and was taken for plain images of the others."""
    first = {"random": RandomSearchConfig(first_seed=7), "algorithm": "halving"}
    search(pipeline, tmp_path / "out", prompts=PROMPTS[:1], **first)
    path = tmp_path / "out" / "candidates.jsonl"
    seed = json.loads(path.read_text().splitlines()[0])["seed"]
    assert [row["baseline"]["seed"] for row in winners(tmp_path / "out")] == [seed]


TILT: dict[str, Any] = {"algorithm": "tilt", "eta": 1.0, "held_out": {}, "budget_nfe": 8}


def test_a_tilt_is_judged_by_a_verifier_that_is_at_hand(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in the hub's cache first, then luminance, never a kind that is searched."""
    said: list[str] = []
    monkeypatch.setattr(judge, "note", said.append)
    red = {"red": VerifierConfig("custom", module="tests.test_search_tilt:Reddish")}
    named = [f"a photo on a {tone} background" for tone in ("black", "white", "gray")]
    search(pipeline, tmp_path / "named", prompts=named, verifiers=red, **TILT)
    assert all([*row["held_out"]] == ["luminance"] for row in winners(tmp_path / "named"))
    assert said == ["held_out is not set; luminance judges the winners (as the prompts name it)"]
    alarms = json.loads((tmp_path / "named" / "hacking.json").read_text())
    assert alarms and {"red", "luminance", "diversity"} == set(alarms[0]["changes"])
    monkeypatch.setattr(judge, "in_cache", lambda hub_id: "PickScore" in hub_id)
    # What was begun goes on with its own judge, whatever the cache holds by now.
    (tmp_path / "named" / "hacking.json").unlink()
    search(pipeline, tmp_path / "named", prompts=named, verifiers=red, **TILT)

    def chosen(**changes: Any) -> dict[str, str | None]:
        given = {"verifiers": red} | TILT | changes
        asked = search_config(pipeline, tmp_path / "none", **given)
        found = judge.with_judge(asked, named, tmp_path / "none").held_out
        return {name: one.checkpoint for name, one in found.items()}

    assert chosen() == {"pick_score": "yuvalkirstain/PickScore_v1"}
    searched = {"clip": VerifierConfig("pick_score", "folder")}
    assert chosen(verifiers=searched) == {"luminance": None}
    assert chosen(algorithm="fk_steering", eta=1.0) == chosen(algorithm="random") == {}
    steering = {"algorithm": "fk_steering", "fk_steering": FkSteeringConfig(tilt=0.1)}
    assert chosen(**steering) == {"pick_score": "yuvalkirstain/PickScore_v1"}
    assert chosen(held_out={"bright": BRIGHT}) == {"bright": None}


def test_a_tilt_without_a_judge_says_that_the_alarm_sees_diversity_alone(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(judge, "note", said.append)
    lines = search(pipeline, tmp_path / "out", **TILT)
    assert "so the hacking alarm is off but for diversity; name one" in said[0]
    for row in winners(tmp_path / "out"):
        assert row["held_out"] == {} and row["score"] > row["baseline"]["scores"]["dark"]
    [alarm] = json.loads((tmp_path / "out" / "hacking.json").read_text())
    assert {*alarm["changes"]} == {"dark", "diversity"}
    costs = lines[0]
    assert re.fullmatch(
        r"tilt, per prompt: 8 NFE, 8 decodes and 6 gradients of verifiers in \S+ s", costs
    )
    section = search_section(tmp_path / "out")
    assert section is not None and costs.split(": ")[1] + " per prompt" in section.note
