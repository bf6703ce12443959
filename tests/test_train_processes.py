"""Two training processes: the losses of one, one signal stops both, and one goes on alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.train.callbacks.checkpoints import checkpoint_steps
from blackpoint.train.records.metrics_file import read_metrics
from tests.test_data_buckets import write_images
from tests.tiny_run import tiny_config
from tests.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def start(
    run_dir: Path, pipeline: Path, shards: Path, max_steps: int, **values: Any
) -> subprocess.Popen:
    """Starts a training of two processes."""
    values |= {"trainer.max_steps": max_steps, "trainer.devices": 2}
    config = tiny_config(run_dir, pipeline, shards, **values)
    yaml = run_dir.with_suffix(".yaml")
    yaml.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return subprocess.Popen([sys.executable, "-m", "blackpoint.scripts.cli", "train", str(yaml)])


@pytest.mark.parametrize("with_buckets", [False, True])
def test_two_processes_have_the_losses_of_one(
    with_buckets: bool, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {}
    if with_buckets:
        shards = write_images(tmp_path / "rectangles", 20)
        values = {"data.buckets.enabled": True, "data.buckets.step_px": 8}
    together = start(tmp_path / "run2", pipeline, shards, 6, **values)
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run1", pipeline, shards, **values)) == 0
    assert together.wait(PATIENCE_S) == 0
    metrics = [read_metrics(tmp_path / name / "metrics.csv") for name in ("run1", "run2")]
    for name in ("train/loss", "train/gradient_norm"):
        one, two = metrics[0][name], metrics[1][name]
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
        assert_close([value for _, value in two], [v for _, v in one], rtol=1e-4, atol=1e-6)


STOPPED_IN_STEP_3 = """
import os, signal, sys
import pytest
from blackpoint.scripts.cli import main
from tests.tiny_run import stop_in_step

stop_in_step(pytest.MonkeyPatch(), 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_of_two_processes_goes_on_in_one(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    unbroken = tiny_config(tmp_path / "unbroken", pipeline, shards)
    assert blackpoint.train.run.fit(unbroken) == 0
    config = tiny_config(tmp_path / "run", pipeline, shards)
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "run.yaml")
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_IN_STEP_3)
    stopped = subprocess.run(
        [sys.executable, str(script), "train", str(tmp_path / "run.yaml"), "trainer.devices=2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=PATIENCE_S,
    )
    assert stopped.returncode == 75
    assert max(checkpoint_steps(tmp_path / "run/checkpoints")) == 4
    assert blackpoint.train.run.fit(config) == 0
    for name in ("train/loss", "train/gradient_norm"):
        one, two = (
            read_metrics(tmp_path / folder / "metrics.csv")[name] for folder in ("unbroken", "run")
        )
        assert [step for step, _ in two] == list(range(1, 7))
        assert_close([value for _, value in two], [v for _, v in one], rtol=1e-4, atol=1e-6)


def test_a_signal_to_one_process_stops_both_saved(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, pipeline, shards, max_steps=100_000)
    wait_for(lambda: checkpoint_steps(run_dir / "checkpoints"), lambda: process.poll() is None)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 75
    last = max(checkpoint_steps(run_dir / "checkpoints"))
    assert max(step for step, _ in read_metrics(run_dir / "metrics.csv")["train/loss"]) == last
