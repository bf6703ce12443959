"""Studies of the repository: what they compare, and that the product does not need them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blackpoint.sampling.report.results import Cell, Results, Value
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.scripts.config import load, read_yaml
from blackpoint.scripts.miniature.digit_judge import DigitJudge, DigitJudgeClasses
from blackpoint.scripts.miniature.digit_readers import save_weights
from blackpoint.scripts.studies import (
    memory_study,
    pixel_study,
    stability_study,
    training_curves,
)
from blackpoint.train.config.config import TrainConfig
from tests.test_imports import ROOT, imports_of, relative

MINIATURE = {
    "blackpoint.scripts.miniature.digits",
    "blackpoint.scripts.miniature.digit_readers",
    "blackpoint.scripts.miniature.digit_judge",
    "blackpoint.scripts.miniature.embedded_base",
    "blackpoint.scripts.miniature.demo_steps",
}
STUDIES = {
    f"scripts.{name}"
    for name in (
        "study",
        "ablation",
        "black_point_study",
        "pixel_study",
        "stability_study",
        "memory_study",
        "training_curves",
    )
}


def test_the_product_imports_neither_the_miniature_nor_the_studies() -> None:
    verbs = [path for path in (ROOT / "scripts").glob("run_*.py") if path.stem != "run_demo"]
    product = [
        path for room in ("data", "sampling", "train") for path in (ROOT / room).rglob("*.py")
    ]
    for path in [*product, *verbs, *(ROOT / "scripts").glob("sweep_[cr]*.py")]:
        assert not imports_of(path) & (MINIATURE | STUDIES), relative(path)


def stability_results(gain: float) -> Results:
    """Returns cells of every arm; methods are above their rivals by `gain`."""
    rng = np.random.default_rng(0)
    cells = []
    for arm in read_yaml(stability_study.YAML)["arms"]:
        searched = arm.startswith(("one image", "best of"))
        level = 0.0 if searched else gain
        cell = Cell(arm, arm, {"search.checkpoint": "base"}, nfe=8.0)
        for quality in stability_study.QUALITIES:
            title = f"{quality} (searched)" if searched and quality == "reader" else quality
            cell.paired[title] = {(n, "p", 0): level + rng.normal() for n in range(23)}
        cells.append(cell)
    return Results("", cells)


@pytest.mark.parametrize("gain", [0.0, 3.0])
def test_every_method_meets_every_rival_and_holm_counts_its_lines(gain: float) -> None:
    table = stability_study.versus(stability_results(gain))
    assert len(table.rows) == len(stability_study.EQUAL_NFE) * 3 * 3
    for row in table.rows:
        assert row["rival"].endswith(row["method"].rpartition(", ")[2])
        difference, p_value = row["difference"], row["p (Holm)"]
        assert (difference.value.low > 0) == difference.is_bold or gain == 0
        assert (p_value < 0.05) == (gain > 0)
        assert (row["wins / ties / losses"] == "23 / 0 / 0") == (p_value < 5e-6)


def test_effects_are_contrasts_of_the_settings_over_seeds() -> None:
    levels = {"neither": 4.0, "shift": 1.0, "multi-scale": 6.0, "both": 2.0}
    cells = [
        Cell(f"{arm} {seed}", arm, {"train.seed": seed}, values={
            name: Value(Estimate(level + seed, 0, 0, 9)) for name in pixel_study.METRICS})
        for arm, level in levels.items()
        for seed in range(3)
    ]  # fmt: skip
    table = pixel_study.effects(Results("", cells))
    found = {(row["metric"], row["effect"]): row["change"].value.value for row in table.rows}
    assert found["KID", "shift alone"] == pytest.approx(-3)
    assert found["KID", "shift, mean of with and without multi-scale"] == pytest.approx(-3.5)
    assert found["KID", "multi-scale, mean of with and without shift"] == pytest.approx(1.5)
    assert found["digits", "interaction"] == pytest.approx(-1)
    assert not pixel_study.effects(Results("", cells[:1])).rows  # not every setting is there


def test_the_judge_gives_features_and_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = DigitJudge()
    save_weights(judge, tmp_path)
    images = torch.rand(3, 3, 32, 32)
    features = DigitJudge.load(tmp_path)(images)
    assert features.shape == (3, 128) and features.abs().max() <= 1
    torch.testing.assert_close(DigitJudgeClasses.load(tmp_path)(images), judge.head(features))


def test_arms_of_memory_are_trainings_and_compare_with_float32_of_their_seed() -> None:
    for keys in memory_study.ARMS.values():
        config = load(TrainConfig, [memory_study.YAML, "run_dir=x", *keys])
        assert config.trainer.max_steps == read_yaml(memory_study.YAML)["trainer"]["max_steps"]
    page = memory_study.page({"float32": [0.4, 0.41, 0.43], "Adafactor": [0.42]})
    assert "differs by 0.0300" in page and "| 0.4200 |  |  | +0.0200 |" in page


def test_the_curves_drawn_are_the_numbers_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_curves, "RUN_DIR", tmp_path)
    expected = ["run,metric,step,value"]
    for number, (title, keys) in enumerate(training_curves.RUNS.items()):
        assert load(TrainConfig, [training_curves.YAML, "run_dir=x", *keys])
        folder = training_curves.folder(title)
        (folder / "previews").mkdir(parents=True)
        Image.new("RGB", (64, 128), (60 * number,) * 3).save(folder / "previews" / "step_9.png")
        rows = [
            f"{step},{name},{1 + step + number}.5"
            for name in (*training_curves.LOSSES, training_curves.NORM)
            for step in (3, 9)
        ]
        (folder / "metrics.csv").write_text("\n".join(["step,name,value", *rows, ""]))
        for row in rows:
            step, name, value = row.split(",")
            expected.append(f"{title},{name},{step},{value}")
    training_curves.draw(str(tmp_path / "curves"))
    assert (tmp_path / "curves.csv").read_text().splitlines() == expected
    with Image.open(tmp_path / "curves.png") as picture:
        shown = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    assert {(60 * number,) * 3 for number in range(len(training_curves.RUNS))} <= shown
