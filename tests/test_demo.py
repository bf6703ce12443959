"""The demo, on a tiny random pipeline: every step, once, in order, restartable."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report.results import Cell, Results, Value, read_results
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.scripts.miniature.demo import run
from blackpoint.scripts.miniature.demo_config import DemoConfig
from blackpoint.scripts.miniature.demo_steps import EXPECTED, outcome
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
    cells = {cell.name for cell in read_results(run_dir / "evaluation").cells}
    assert len(cells) == 4
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Search over noise" in page
    assert "fine-tuned" in page and "Loss of the fine-tune" in page

    assert run(dataclasses.replace(config, control=True)) == 0
    second = capsys.readouterr().out
    assert (
        second.count("there already") == 5
    )  # two packs, the base's samples, the fine-tune, the search
    results = read_results(run_dir / "evaluation")
    assert {cell.name for cell in results.cells} > cells
    assert {cell.arm for cell in results.cells if cell.values} == {"base", "fine-tuned", "control"}
    timings = json.loads((run_dir / "timings.json").read_text())
    assert len(timings) == 8


def test_what_was_measured_stands_beside_what_is_expected() -> None:
    header = "checkpoint guidance measured [95 % interval] expected of all captions"
    assert outcome(Results("", [])).split() == header.split()
    value = Value(Estimate(0.01, 0.0, 0.02, 40), "")
    guidance = {"evaluate.guidance_scale": 3.0}
    cell = Cell("", "fine-tuned", guidance, values={"luminance, black": value})
    line = "luminance, black fine-tuned 3 0.01 [0, 0.02] at most .05"
    assert outcome(Results("", [cell])).splitlines()[1].split() == line.split()
    assert all("fine-tuned" in expected for expected in EXPECTED.values())


def test_a_demo_of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="num_images=1 must be at least 2"):
        DemoConfig(num_images=1)
