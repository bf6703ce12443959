"""Runs that torchrun starts, ranks that nobody gave, and runs that say that they won't export."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.scripts.cli import main
from blackpoint.train.cluster.cluster import as_launched
from blackpoint.train.records.metrics_file import read_metrics
from tests.tiny_run import tiny_config
from tests.waiting import PATIENCE_S

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1"}
LIGHTNING = {"NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "1"}


def launched(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in (*TORCHRUN, *LIGHTNING, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("local", "world", "asked", "processes"),
    [
        ("2", "2", (1, 1), (2, 1)),
        ("2", "4", (1, 1), (2, 2)),
        ("2", "4", (2, 2), (2, 2)),
        ("1", "1", (1, 1), (1, 1)),
        ("2", "2", (3, 1), None),
        ("1", "1", (2, 1), None),
        ("2", "4", (4, 1), None),
        ("2", "3", (1, 1), None),
    ],
)
def test_devices_are_those_of_torchrun_or_the_run_is_refused(
    local: str,
    world: str,
    asked: tuple[int, int],
    processes: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    launched(monkeypatch, TORCHRUN | {"LOCAL_WORLD_SIZE": local, "WORLD_SIZE": world})
    values = {"trainer.devices": asked[0], "trainer.num_nodes": asked[1], "batch_size": 12}
    config = tiny_config(tmp_path / "run", tmp_path, tmp_path, **values)
    if processes is None:
        with pytest.raises(UserError, match=f"torchrun started {world} processes.*--nproc-per"):
            as_launched(config)
    else:
        trainer = as_launched(config).trainer
        assert (trainer.devices, trainer.num_nodes) == processes


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, None),
        (LIGHTNING, None),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "RANK": "1"}, None),
        ({"RANK": "0"}, "RANK"),
        ({"RANK": "1"}, "RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        (LIGHTNING | {"RANK": "1"}, "RANK"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "RANK": "0"}, "RANK"),
    ],
)
def test_a_rank_that_no_launcher_gave_is_refused_before_anything_is_written(
    values: dict[str, str],
    name: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    launched(monkeypatch, values)
    config = tiny_config(tmp_path / "run", tmp_path, tmp_path)
    if name is None:
        assert as_launched(config) is config
        return
    with pytest.raises(UserError, match=f"^{name}=. is set in the environment.*unset {name}`"):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_one_run_on_its_processes(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run2", pipeline, shards)
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "run.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
        "blackpoint.scripts.cli",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # torchrun's own, without its warning
    command = [*torchrun, "train", str(tmp_path / "run.yaml")]
    assert subprocess.run(command, env=environment, timeout=PATIENCE_S).returncode == 0
    assert (tmp_path / "run2/export/model_index.json").exists()
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run1", pipeline, shards)) == 0
    for name in ("train/loss", "train/gradient_norm"):
        one, two = (read_metrics(tmp_path / r / "metrics.csv")[name] for r in ("run1", "run2"))
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
        assert_close([value for _, value in two], [v for _, v in one], rtol=1e-4, atol=1e-6)


def test_a_run_that_cannot_be_exported_says_so_first_and_ends_well(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"loss.prediction_type": "epsilon", "allow_unsound": True}
    config = tiny_config(tmp_path / "run", pipeline, shards, **values, **{"trainer.max_steps": 1})
    assert blackpoint.train.run.fit(config) == 0
    before, _, after = capsys.readouterr().err.partition("global batch")
    assert "note: epsilon-prediction with zero terminal SNR is not exported" in before
    assert "allow_unsound=true" in before
    assert "done, without an export" in after
    assert not (tmp_path / "run/export").exists()
    arguments = ["export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert "verify=false writes the folder unchecked" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "verify=false"]) == 0
    assert (tmp_path / "out/model_index.json").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"schedule.timestep_spacing": "leading"},
        {"schedule.timestep_spacing": "linspace"},
        {"loss.offset_noise": 0.1},
        {"loss.prediction_type": "sample"},
    ],
)
def test_other_unsound_runs_are_exported(
    values: dict[str, Any], pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    values = values | {"trainer.max_steps": 1, "allow_unsound": True}
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **values)) == 0
    assert (tmp_path / "run/export/model_index.json").exists()
