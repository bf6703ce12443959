"""The demo, on a tiny random pipeline: every step, once, in order, restartable."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.report.rows import read_rows
from blackpoint.scripts.miniature.demo_steps import EXPECTED, outcome
from blackpoint.scripts.miniature.digit_perceptron import DigitPerceptron
from blackpoint.scripts.miniature.digit_reader import DigitReader, save_weights
from blackpoint.scripts.verbs.demo import DemoConfig, run
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
        num_images=2,
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
    rows = read_rows(run_dir / "black_point" / "rows.csv.gz")
    assert {row.checkpoint for row in rows} == {"data", "base", "fine_tuned"}
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Search over noise" in page
    assert "fine-tuned" in page and "Loss of the fine-tune" in page

    assert run(dataclasses.replace(config, control=True)) == 0
    second = capsys.readouterr().out
    assert (
        second.count("there already") == 5
    )  # two packs, the base's samples, the fine-tune, the search
    rows_with_control = read_rows(run_dir / "black_point" / "rows.csv.gz")
    assert set(rows) < set(rows_with_control)
    assert {row.checkpoint for row in rows_with_control} >= {"control"}
    timings = json.loads((run_dir / "timings.json").read_text())
    assert len(timings) == 8

    with pytest.raises(UserError, match="rows of another study: fine_tuned changed"):
        run(dataclasses.replace(config, max_steps=4))


def test_expectations_cover_what_the_study_measures() -> None:
    header = "checkpoint measured [95 % interval] expected at 500 images"
    assert outcome([]).split() == header.split()
    assert all("fine_tuned" in expected for expected in EXPECTED.values())


def test_a_demo_of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="num_images=1 must be at least 2"):
        DemoConfig(num_images=1)
