"""The black-point study: what it samples, that it restarts, and that its numbers tell models
apart."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation import black_point_study
from blackpoint.sampling.evaluation.black_point import BlackPointConfig, Captions, study_cells
from blackpoint.sampling.evaluation.black_point_study import (
    Identity,
    Load,
    reference_rows,
    run_study,
)
from blackpoint.sampling.evaluation.black_point_summary import (
    OPEN_RATIO,
    READ,
    Finding,
    border_name,
    markdown,
    read_difference_name,
    show,
    summary,
    write_summary,
)
from blackpoint.sampling.report.rows import DATA, Row, read_rows, write_rows
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.scripts.miniature.digit_reader import DigitReader, save_weights
from blackpoint.scripts.miniature.digits import BACKGROUNDS, INKS, digit_of
from blackpoint.scripts.miniature.evaluation import digit_captions
from tests.digit_painter import SquarePainter, load_square_painter

IDENTITIES = {"base": Identity("a"), "fine_tuned": Identity("b")}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlackPointConfig:
    monkeypatch.setattr(black_point_study, "CHUNK_IMAGES", 15)
    torch.manual_seed(0)
    save_weights(DigitReader(), tmp_path / "reader")
    return BlackPointConfig(
        checkpoints={"base": "pull=0.9", "fine_tuned": "pull=0"},
        output=str(tmp_path / "study"),
        digit_reader=str(tmp_path / "reader"),
        num_images=20,
        border_images=20,
        beside_images=20,
        read_images=50,
        guidance_scales=[1.0, 3.0],
        gallery_images=2,
        num_processes=1,
    )


def reference() -> list[Row]:
    torch.manual_seed(0)
    images = torch.linspace(0, 255, 5).repeat(20)[:, None, None, None].expand(100, 3, 16, 16).byte()
    return reference_rows(images, [("a red one", 1)] * 100, DigitReader().eval())


def study(config: BlackPointConfig, load: Load = load_square_painter) -> list[Row]:
    return run_study(config, digit_captions(), reference(), IDENTITIES, load)


def test_cells_hold_the_images_that_each_question_needs() -> None:
    config = BlackPointConfig(checkpoints={"base": "x"})
    cells = {cell.name: cell for cell in study_cells(config, digit_captions(), "base")}
    named = {
        f"{group}_g{scale}" for group in ("black", "white") for scale in ("1", "3", "5", "7.5")
    }
    assert set(cells) == {"open_g1", "other_g3"} | named
    for scale in ("1", "3", "5", "7.5"):  # black and white together
        assert sum(cells[f"{group}_g{scale}"].num_images for group in ("black", "white")) >= 500
    assert cells["open_g1"].num_images == cells["black_g3"].num_images == 500
    assert sum(cells[name].num_images for name in ("black_g3", "white_g3", "other_g3")) == 2000
    assert {cell.guidance_rescale for cell in cells.values() if cell.guidance_scale == 1} == {0.0}
    assert {cell.guidance_rescale for cell in cells.values() if cell.guidance_scale > 1} == {0.7}


def test_brief_checkpoints_have_the_open_cell_alone() -> None:
    config = BlackPointConfig(checkpoints={"base": "x", "control": "y"}, brief=["control"])
    cells = {cell.name: cell for cell in study_cells(config, digit_captions(), "control")}
    sizes = {name: cell.num_images for name, cell in cells.items()}
    assert sizes == {"open_g1": 500}
    with pytest.raises(UserError, match="brief="):
        BlackPointConfig(checkpoints={"base": "x"}, brief=["control"])


def test_captions_are_all_of_the_data_and_balanced_in_digits() -> None:
    captions = digit_captions()
    assert len(captions.open) == 10 * len(INKS)
    num_captions = sum(len(group) for group in (captions.black, captions.white, captions.other))
    clashes = sum(name in INKS for name in BACKGROUNDS)
    assert num_captions == 10 * (len(INKS) * (len(BACKGROUNDS) + 1) - clashes)
    for group in (captions.open, captions.black, captions.white, captions.other):
        assert all(digit_of(prompt) == digit for prompt, digit in group)
        assert set(Counter(digit for _, digit in group[:50]).values()) <= {4, 5}


def test_numbers_tell_a_gray_model_from_a_good_one(config: BlackPointConfig) -> None:
    rows = study(config)
    found = {
        (each.quantity, each.checkpoint): each.estimate
        for each in summary(rows, list(config.checkpoints))
    }
    assert found[OPEN_RATIO, "base"].value == pytest.approx(0.1, abs=0.03)
    assert found[OPEN_RATIO, "fine_tuned"].low < 1 < found[OPEN_RATIO, "fine_tuned"].high
    assert found[border_name("black", 3), "base"].value == pytest.approx(0.45, abs=1e-4)
    assert found[border_name("black", 1), "fine_tuned"].value == pytest.approx(0, abs=1e-4)
    assert found[border_name("white", 3), "fine_tuned"].value == pytest.approx(1, abs=1e-4)
    assert found[READ, "base"].n == 50
    assert (read_difference_name("base"), "base") not in found
    assert found[read_difference_name("base"), "fine_tuned"].n == 50


def test_prompts_and_seeds_are_the_same_for_every_checkpoint(config: BlackPointConfig) -> None:
    rows = study(config)
    by_name = {name: [row for row in rows if row.checkpoint == name] for name in config.checkpoints}
    made = [
        {(row.cell, row.index): (row.prompt, row.seed, row.digit) for row in own}
        for own in by_name.values()
    ]
    assert made[0] == made[1] and len(made[0]) == 20 + 4 * 20 + 10


def test_a_killed_study_continues_and_equals_an_unbroken_one(
    config: BlackPointConfig, tmp_path: Path
) -> None:
    calls = []

    class Dies(SquarePainter):
        def sample(self, prompts: list[str], seeds: list[int], **settings: object) -> torch.Tensor:
            calls.append(len(seeds))
            if len(calls) == 5:
                raise KeyboardInterrupt
            return super().sample(prompts, seeds, **settings)

    with pytest.raises(KeyboardInterrupt):
        study(config, lambda checkpoint: Dies(load_square_painter(checkpoint).pull))
    num_before = sum(calls[:4])
    calls.clear()
    continued = study(config, lambda checkpoint: counted(checkpoint, calls))
    assert sum(calls) == 2 * 110 - num_before
    unbroken = study(dataclasses.replace(config, output=str(tmp_path / "unbroken")))
    assert sorted(continued, key=lambda row: row.key) == sorted(unbroken, key=lambda row: row.key)
    calls.clear()
    assert len(study(config, lambda checkpoint: counted(checkpoint, calls))) == len(continued)
    assert not calls


def counted(checkpoint: str, calls: list[int]) -> SquarePainter:
    class Counts(SquarePainter):
        def sample(self, prompts: list[str], seeds: list[int], **settings: object) -> torch.Tensor:
            calls.append(len(seeds))
            return super().sample(prompts, seeds, **settings)

    return Counts(load_square_painter(checkpoint).pull)


def test_a_larger_study_keeps_the_images_of_the_smaller(config: BlackPointConfig) -> None:
    small = set(study(config))
    calls: list[int] = []
    large = study(
        dataclasses.replace(
            config, num_images=25, border_images=25, beside_images=25, read_images=65
        ),
        lambda checkpoint: counted(checkpoint, calls),
    )
    assert small <= set(large)
    assert sum(calls) == 2 * (5 * 5 + 5)


@pytest.mark.slow
def test_processes_give_the_rows_of_one(config: BlackPointConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(config, num_images=10, border_images=10, read_images=25)
    one = study(small)
    two = study(dataclasses.replace(small, output=str(tmp_path / "two"), num_processes=2))
    assert sorted(one, key=lambda row: row.key) == sorted(two, key=lambda row: row.key)
    assert len(list((tmp_path / "two" / "images").rglob("*.png"))) == 2 * 6 * 2


def test_rows_of_another_study_are_not_mixed_in(config: BlackPointConfig) -> None:
    study(config)
    with pytest.raises(UserError, match="seed changed"):
        study(dataclasses.replace(config, seed=1))
    retrained = IDENTITIES | {"base": Identity("retrained")}
    with pytest.raises(UserError, match="base changed"):
        run_study(config, digit_captions(), [], retrained, load_square_painter)


def test_summary_is_the_same_from_rows_in_any_order_and_from_their_file(
    config: BlackPointConfig, tmp_path: Path
) -> None:
    rows = study(config)
    names = list(config.checkpoints)
    written = write_summary(tmp_path / "out", rows, names, 3.0)
    again = read_rows(tmp_path / "out" / "rows.csv.gz")
    np.random.default_rng(0).shuffle(again)  # type: ignore[arg-type]
    assert markdown(summary(again, names)) == markdown(written)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| quantity | data | base | fine_tuned |" in text and "n=50" in text
    content = (tmp_path / "out" / "rows.csv.gz").read_bytes()
    write_rows(tmp_path / "out" / "rows.csv.gz", again)
    assert (tmp_path / "out" / "rows.csv.gz").read_bytes() == content


def test_images_that_are_not_finite_stop_the_study(config: BlackPointConfig) -> None:
    class Broken(SquarePainter):
        def sample(self, prompts: list[str], seeds: list[int], **settings: object) -> torch.Tensor:
            return super().sample(prompts, seeds) * float("nan")

    with pytest.raises(RuntimeError, match="base open_g1: sampled images hold NaN"):
        study(config, lambda checkpoint: Broken(0.0))


def test_config_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="add it there"):
        BlackPointConfig(checkpoints={"base": "x"}, guidance_scales=[1.0])
    with pytest.raises(UserError, match="kept for real images"):
        BlackPointConfig(checkpoints={DATA: "x"})
    with pytest.raises(UserError, match="num_steps=0 must be at least 1"):
        BlackPointConfig(checkpoints={"base": "x"}, num_steps=0)


def test_missing_cells_leave_their_numbers_out() -> None:
    captions = Captions([("a red one", 1)], [], [], [])
    assert captions.open
    assert [each.quantity for each in summary(reference(), ["base"])] == [
        "open: std of border luminance",
        READ,
    ]
    assert (
        show(Finding("x", READ, Estimate(0.5, 0.25, 0.75, 8)).estimate, READ)
        == "50.0 % [25.0, 75.0] n=8"
    )


def test_rows_file_that_is_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has columns"):
        read_rows(tmp_path / "rows.csv")
