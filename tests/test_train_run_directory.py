"""Laws of what a run directory records of the run's starts."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.picture_size import READER_VERSION
from blackpoint.scripts.config import load
from blackpoint.train.config.config import PreviewConfig, TrainConfig
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.environment import describe_environment
from blackpoint.train.records.run_directory import RunRecord, write_records
from blackpoint.train.run import batches_note
from tests.tiny_run import tiny_config


def read_environment(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "environment.json").read_text())


def test_every_start_tells_its_global_batch_and_number_formats(tmp_path: Path) -> None:
    settings = {"batch_size": 8, "trainer.accumulate_grad_batches": 3, "trainer.devices": 2}
    settings |= {"trainer.encoder_dtype": "bfloat16", "trainer.tf32": True}
    config = tiny_config(tmp_path, Path("base"), Path("shards"), **settings)
    write_records(RunRecord.read(tmp_path), config, device="cuda")
    first = read_environment(tmp_path)
    config.trainer.devices, config.trainer.num_nodes = 4, 2
    write_records(RunRecord.read(tmp_path), config, resume_step=500, device="cuda")
    second = read_environment(tmp_path)
    assert second["starts"][0] == first["starts"][0]
    assert {**second, "starts": None} == {**first, "starts": None}
    common = {"images_per_step": 24, "accumulate_grad_batches": 3}
    common |= {"device": "cuda", "encoder_dtype": "bfloat16", "tf32": True}
    common |= {"decoder": READER_VERSION}
    for start, expected in zip(
        second["starts"],
        [
            {"step": 0, "num_processes": 2, "images_per_process": 4, **common},
            {"step": 500, "num_processes": 8, "images_per_process": 1, **common}
            | {"changed": {"trainer.devices": [2, 4], "trainer.num_nodes": [1, 2]}},
        ],
        strict=True,
    ):
        assert start.pop("started") and start.pop("host")
        assert start == expected


@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("")])
def test_a_lost_record_does_not_stop_a_run(tmp_path: Path, spoil: Any, name: str) -> None:
    config = tiny_config(tmp_path, Path("base"), Path("shards"))
    write_records(RunRecord.read(tmp_path), config)
    spoil(tmp_path / name)
    check_continues(tmp_path, config)
    write_records(RunRecord.read(tmp_path), config, resume_step=3)
    environment = read_environment(tmp_path)
    assert environment["versions"]
    assert [start["step"] for start in environment["starts"]] == [3]


def test_a_directory_that_is_no_run_yet_takes_nothing_over(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"command": "another"}')
    write_records(RunRecord.read(tmp_path), tiny_config(tmp_path, Path("base"), Path("shards")))
    assert read_environment(tmp_path)["command"] != "another"


def test_the_global_batch_is_said(tmp_path: Path) -> None:
    settings = {"batch_size": 8, "trainer.accumulate_grad_batches": 3, "trainer.devices": 2}
    config = tiny_config(tmp_path, Path("base"), Path("shards"), **settings)
    assert batches_note(config) == (
        "global batch: 24 images per step = 2 processes x 4 images x 3 accumulated; "
        "learning rate 0.001"
    )


def test_a_config_that_omegaconf_wrote_is_the_same_config(tmp_path: Path) -> None:
    """Runs begun before texts were written by blackpoint.data.files.yaml_text go on."""
    config = tiny_config(tmp_path, Path("sd"), Path("shards"), **{"preview.prompts": ["no", "1e5"]})
    old = OmegaConf.to_yaml(OmegaConf.structured(config))
    (tmp_path / "config.yaml").write_text(old)
    check_continues(tmp_path, config)
    with pytest.raises(UserError, match="seed: 0 there, 7 now"):
        check_continues(tmp_path, dataclasses.replace(config, seed=7))


def test_prompts_of_any_characters_are_kept_and_continued(tmp_path: Path) -> None:
    prompts = ["a ${ cat", "${b}", "???", "#3", "null"]
    config = tiny_config(tmp_path, Path("sd"), Path("shards"))
    config = dataclasses.replace(config, preview=PreviewConfig(prompts=prompts))
    write_records(RunRecord.read(tmp_path), config)
    check_continues(tmp_path, config)
    assert load(TrainConfig, [str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("program", ["/x/.venv/bin/blackpoint", "/x/scripts/verb_process.py"])
def test_a_command_is_recorded_as_it_is_typed(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "a b.yaml"])
    assert describe_environment()["command"] == "blackpoint train 'a b.yaml'"
