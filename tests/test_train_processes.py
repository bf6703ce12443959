"""Two training processes: the losses of one, and one signal stops both at the same step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch.testing import assert_close

from tests.tiny_run import tiny_config
from train.checkpoints import checkpoint_steps
from train.metrics_file import read_metrics

pytestmark = pytest.mark.slow


def start(
    run_dir: Path, pipeline: Path, shards: Path, devices: int, max_steps: int
) -> subprocess.Popen:
    config = tiny_config(run_dir, pipeline, shards, **{"trainer.max_steps": max_steps})
    yaml = run_dir.with_suffix(".yaml")
    yaml.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    command = [sys.executable, "-m", "scripts.cli", "train", str(yaml)]
    return subprocess.Popen([*command, f"trainer.devices={devices}"])


def test_two_processes_have_the_losses_of_one(pipeline: Path, shards: Path, tmp_path: Path) -> None:
    metrics = {}
    for devices in (1, 2):
        run_dir = tmp_path / f"run{devices}"
        assert start(run_dir, pipeline, shards, devices, max_steps=6).wait(300) == 0
        metrics[devices] = read_metrics(run_dir / "metrics.csv")
    for name in ("train/loss", "train/gradient_norm"):
        one, two = metrics[1][name], metrics[2][name]
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
        assert_close([value for _, value in two], [v for _, v in one], rtol=1e-4, atol=1e-6)


def test_a_signal_to_one_process_stops_both_saved(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, pipeline, shards, devices=2, max_steps=100_000)
    deadline_s = time.monotonic() + 300
    while len(checkpoint_steps(run_dir / "checkpoints")) < 1:
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(300) == 75
    last = max(checkpoint_steps(run_dir / "checkpoints"))
    assert max(step for step, _ in read_metrics(run_dir / "metrics.csv")["train/loss"]) == last
