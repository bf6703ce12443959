"""Laws of a run's identity: its data are what they hold, and a resume finds them anywhere."""

import json
import os
import shutil
from pathlib import Path

import pytest

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.data.index.contents import DIGESTS_FILE, STAMPS_FILE
from blackpoint.data.index.index import INDEX_FOLDER
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.run_directory import (
    IDENTITY,
    RunRecord,
    read_identity,
    write_identity,
)
from blackpoint.train.records.run_identity import check_same_data
from tests.tiny_run import Killed, assert_same_run, kill, stop_in_step, tiny_config


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


@pytest.fixture
def stopped(pipeline: Path, shards: Path, tmp_path: Path) -> TrainConfig:
    """A run that was killed after three steps, and its own copy of the shards."""
    shutil.copytree(shards, tmp_path / "shards")
    config = tiny_config(tmp_path / "run", pipeline, tmp_path / "shards")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    return config


def recaption(shards: Path) -> None:
    """Puts other words of the same length into a shard, and lets it be indexed anew."""
    (shard,) = shards.glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b"white background", b"green background"))
    shutil.rmtree(shards / INDEX_FOLDER)


def test_a_resume_finds_its_data_at_another_place(
    stopped: TrainConfig, tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    shutil.copytree(tmp_path / "shards", tmp_path / "scratch" / "node")
    os.utime(next((tmp_path / "scratch" / "node").glob("*.tar")))
    (tmp_path / "shards").rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path / "scratch")
    stopped.data.shards = "node"
    assert blackpoint.train.run.fit(stopped) == 0
    unbroken = tiny_config(tmp_path / "unbroken", pipeline, tmp_path / "gone")
    assert blackpoint.train.run.fit(unbroken) == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_other_data_at_the_same_place_are_refused_by_name(
    stopped: TrainConfig, tmp_path: Path
) -> None:
    recaption(tmp_path / "shards")
    with pytest.raises(UserError, match="run of other data") as error:
        blackpoint.train.run.fit(stopped)
    assert "data.shards: other content in shard-000000.tar, of 1 shards" in str(error.value)
    stopped.data.validation_shards = str(tmp_path / "shards")
    with pytest.raises(UserError, match="data.validation_shards: was not set"):
        blackpoint.train.run.fit(stopped)


def test_rewritten_shards_that_were_not_indexed_anew_are_refused(
    stopped: TrainConfig, tmp_path: Path
) -> None:
    (shard,) = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b"white background", b"green background"))
    with pytest.raises(UserError, match="shard-000000.tar has changed since the index"):
        blackpoint.train.run.fit(stopped)


def test_a_finished_run_does_nothing_for_its_own_data_alone(
    stopped: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert blackpoint.train.run.fit(stopped) == 0
    shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    stopped.data.shards = str(tmp_path / "moved")
    assert blackpoint.train.run.fit(stopped) == 0
    assert "is finished" in capsys.readouterr().err
    recaption(tmp_path / "moved")
    with pytest.raises(UserError, match="run of other data"):
        blackpoint.train.run.fit(stopped)


def test_a_run_without_a_record_is_adopted_once_where_its_data_were(
    stopped: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = read_identity(tmp_path / "run")
    (tmp_path / "run" / IDENTITY).unlink()
    for name in (DIGESTS_FILE, STAMPS_FILE):
        (tmp_path / "shards" / INDEX_FOLDER / name).unlink()
    shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    stopped.data.shards = str(tmp_path / "moved")
    with pytest.raises(UserError, match="continue it once with the data where they were"):
        check_continues(tmp_path / "run", stopped)
    stopped.data.shards = os.path.relpath(tmp_path / "shards")
    assert blackpoint.train.run.fit(stopped) == 0
    told = capsys.readouterr().err
    assert "did not record what its data hold" in told and "had no digests" in told
    assert read_identity(tmp_path / "run")["data"] == recorded["data"]


def test_other_sections_are_left_as_they_are(tmp_path: Path) -> None:
    write_identity(tmp_path, base={"unet": "x"})
    write_identity(tmp_path, data={})
    assert json.loads((tmp_path / IDENTITY).read_text()) == {"base": {"unet": "x"}, "data": {}}


def test_what_is_known_by_places_alone_is_adopted_when_its_content_is(tmp_path: Path) -> None:
    def data_of(whole: str, samples: str = "s") -> dict[str, object]:
        return {"data.shards": {"shards": [["a.tar", 0, whole, samples]], "empty_caption": None}}

    (tmp_path / "config.yaml").write_text("seed: 0\n")
    write_identity(tmp_path, data=data_of(""))
    assert "now by their content" in check_same_data(RunRecord.read(tmp_path), data_of("w"))
    assert check_same_data(RunRecord.read(tmp_path), data_of("")) == ""
    with pytest.raises(UserError, match="other content in a.tar"):
        check_same_data(RunRecord.read(tmp_path), data_of("w", "t"))
    write_identity(tmp_path, data=data_of("v"))
    with pytest.raises(UserError, match="other content in a.tar"):
        check_same_data(RunRecord.read(tmp_path), data_of("w"))
