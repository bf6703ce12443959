"""The demo, on a tiny random pipeline: every step, once, in order, restartable."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report.results import Cell, Results, Value, read_results
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.scripts.miniature import demo_steps
from blackpoint.scripts.miniature.demo import run
from blackpoint.scripts.miniature.demo_config import DemoConfig
from blackpoint.scripts.miniature.demo_steps import EXPECTED, OPEN, first_picture, outcome
from blackpoint.scripts.miniature.digit_readers import DigitPerceptron, DigitReader, save_weights
from tests.tiny_pipeline import make_tiny_pipeline

FINE_TUNE = """
run_dir: unused
checkpoint: unused
batch_size: 4
data: {shards: unused, resolution: 16, num_workers: 0, validation_images: 4}
optimizer: {learning_rate: 1e-3, warmup_steps: 2}
trainer: {max_steps: 3, validate_every_steps: 2, checkpoint_every_steps: 2, log_every_steps: 1}
preview: {every_steps: 3, prompts: [a red one], num_images: 1, num_steps: 2}
wandb: {enabled: false}
"""
OLD_PROCESS = """
schedule: {zero_terminal_snr: false, timestep_spacing: leading}
loss: {prediction_type: epsilon}
"""


@pytest.fixture
def config(tmp_path: Path) -> DemoConfig:
    torch.manual_seed(0)
    save_weights(DigitReader(), tmp_path / "reader")
    save_weights(DigitPerceptron(), tmp_path / "held_out_reader")
    (tmp_path / "fine_tune.yaml").write_text(FINE_TUNE)
    (tmp_path / "control.yaml").write_text(FINE_TUNE + OLD_PROCESS)
    return DemoConfig(
        run_dir=str(tmp_path / "demo"),
        config=str(tmp_path / "fine_tune.yaml"),
        control_config=str(tmp_path / "control.yaml"),
        checkpoint=str(make_tiny_pipeline(tmp_path / "base")),
        digit_reader=str(tmp_path / "reader"),
        held_out_reader=str(tmp_path / "held_out_reader"),
        search_candidates=2,
        num_train_images=12,
        num_held_out_images=4,
        num_images=11,
        reference_images=20,
        num_steps=2,
        num_processes=1,
    )


@pytest.mark.slow
def test_demo_does_every_step_once(
    config: DemoConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = Path(config.run_dir)
    assert run(config) == 0
    first = capsys.readouterr().out
    assert "there already" not in first
    assert f"report: {run_dir / 'report.html'}" in first
    assert (run_dir / "export" / "model_index.json").is_file()
    with Image.open(run_dir / "before_after.png") as picture:
        assert picture.size[0] > picture.size[1]
    told = first.index("before and after: ")
    assert first.index("fine-tune to") < told < first.index("sample and measure")
    cells = {cell.name for cell in read_results(run_dir / "evaluation").cells}
    assert len(cells) == 4
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Search over noise" in page
    assert "fine-tuned" in page and "Loss of the fine-tune" in page

    assert run(dataclasses.replace(config, control=True)) == 0
    second = capsys.readouterr().out
    assert second.count("there already") == 4  # two packs, the fine-tune, the search
    results = read_results(run_dir / "evaluation")
    assert {cell.name for cell in results.cells} > cells
    arms = {cell.arm for cell in results.cells if cell.values}
    assert arms == {name + end for name in ("base", "fine-tuned", "control") for end in ("", OPEN)}
    timings = json.loads((run_dir / "timings.json").read_text())
    assert len(timings) == 7


def test_the_first_picture_waits_for_a_whole_preview(
    config: DemoConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(config.run_dir)
    path, previews = run_dir / "before_after.png", run_dir / "previews"
    compose = first_picture(run_dir, 0.0)
    compose()
    previews.mkdir(parents=True)
    preview = previews / "step_00000003.png"
    Image.effect_noise((332, 150), 50).save(previews / "step_00000000.png")  # the base's
    compose()
    Image.effect_noise((332, 150), 50).save(preview)
    content = preview.read_bytes()
    for size in (0, len(content) // 2):
        preview.write_bytes(content[:size])
        compose()
    assert not path.exists() and "before and after" not in capsys.readouterr().out
    preview.write_bytes(content)
    compose()
    compose()
    assert capsys.readouterr().out.count(f"before and after: {path.resolve()}") == 1
    with Image.open(path) as picture:
        assert picture.width > 332


def test_who_waits_for_training_is_called_and_takes_its_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, calls = "raise SystemExit(75)", list[str]()
    monkeypatch.setattr(demo_steps, "verb_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(SystemExit) as stopped:
        demo_steps.train_in_processes([], lambda: calls.append("called"))
    assert stopped.value.code == 75 and calls


def test_what_was_measured_stands_beside_what_is_expected() -> None:
    header = "checkpoint measured [95 % interval] expected of all captions"
    assert outcome(Results("", [])).split() == header.split()
    value = Value(Estimate(0.01, 0.0, 0.02, 40), "")
    cell = Cell("", "fine-tuned", values={"luminance, black": value})
    line = "luminance, black fine-tuned 0.01 [0, 0.02] at most .05"
    assert outcome(Results("", [cell])).splitlines()[1].split() == line.split()
    assert all(any("fine-tuned" in arm for arm in by_arm) for by_arm in EXPECTED.values())


def test_a_demo_of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="num_images=1 must be at least 2"):
        DemoConfig(num_images=1)
