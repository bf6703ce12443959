"""Laws of a run's base: it is what it holds, wherever it lies, and is read once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import blackpoint.train.records.base_identity
import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.base_identity import base_differences, base_identity
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.run_directory import (
    IDENTITY,
    RunRecord,
    read_identity,
    write_identity,
    write_records,
)
from blackpoint.train.records.run_identity import check_same_base
from tests.pixel_models import pixel_model
from tests.tiny_run import Killed, assert_same_run, kill, stop_in_step, tiny_config

LONG_AGO = (1e9, 1e9)


def change_weight(folder: Path, part: str) -> None:
    """Changes one number of a part, and nothing about its file's size and name."""
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["on</w>"] = vocabulary["on</w>"], vocabulary["a</w>"]
    path.write_text(json.dumps(found))


CHANGES: dict[str, Callable[[Path], None]] = {
    "UNet": lambda folder: change_weight(folder, "unet"),
    "VAE": lambda folder: change_weight(folder, "vae"),
    "text encoder": lambda folder: change_weight(folder, "text_encoder"),
    "tokenizer": change_words,
    "betas (scheduler)": lambda folder: change_json(
        folder / "scheduler" / "scheduler_config.json", beta_end=0.013
    ),
    "scaling_factor (vae/config.json)": lambda folder: change_json(
        folder / "vae" / "config.json", scaling_factor=0.2
    ),
}


def copied(base: Path, folder: Path) -> Path:
    """Copies a base, all of it long ago."""
    shutil.copytree(base, folder)
    for path in folder.rglob("*"):
        os.utime(path, LONG_AGO)
    return folder


def config_of(folder: Path) -> TrainConfig:
    return tiny_config(Path("run"), folder, Path("shards"))


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_that_is_another_is_named(part: str, pipeline: Path, tmp_path: Path) -> None:
    base = copied(pipeline, tmp_path / "base")
    before = base_identity(config_of(base))
    assert base_differences(before, base_identity(config_of(pipeline))) == []
    CHANGES[part](base)
    now = base_identity(config_of(base), before=before)
    assert base_differences(before, now) == [part]


def test_a_base_is_read_again_only_where_its_files_look_otherwise(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    for name in ("unet_digest", "vae_digest", "text_encoder_digest", "tokenizer_digest"):
        real = getattr(blackpoint.train.records.base_identity, name)

        def count(*of: Any, name: str = name, real: Any = real, **more: Any) -> str:
            read.append(name)
            return real(*of, **more)

        monkeypatch.setattr(blackpoint.train.records.base_identity, name, count)
    base, said = copied(pipeline, tmp_path / "base"), list[str]()
    first = base_identity(config_of(base), say=said.append)
    assert len(read) == 4 and len(said) == 1 and "read the base" in said[0]
    moved = base.rename(tmp_path / "moved")
    again = base_identity(config_of(moved), DiffusionModel.load(moved), first, said.append)
    assert (len(read), len(said), again) == (4, 1, first)
    os.utime(next((moved / "vae").glob("*.safetensors")))
    touched = base_identity(config_of(moved), before=again, say=said.append)
    assert read[4:] == ["vae_digest"] and len(said) == 2
    assert base_differences(again, touched) == []


def test_a_file_written_a_moment_ago_is_read_again(pipeline: Path, tmp_path: Path) -> None:
    """Its size and time could stay the same while it changes."""
    base = copied(pipeline, tmp_path / "base")
    os.utime(base / "vae" / "config.json")
    before = base_identity(config_of(base))
    assert "" in before["VAE"]["stamps"].values()
    now = base_identity(config_of(base), before=before)
    assert now["VAE"] is not before["VAE"] and now["UNet"] is before["UNet"]


def test_a_base_is_the_same_in_another_form(pipeline: Path, tmp_path: Path) -> None:
    """Saved again by our own export, whose configs and file names are others."""
    DiffusionModel.load(pipeline).save(tmp_path / "saved")
    names = base_differences(
        base_identity(config_of(pipeline)), base_identity(config_of(tmp_path / "saved"))
    )
    assert names == []


def test_a_resume_finds_its_base_at_another_place_and_refuses_another(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    base = copied(pipeline, tmp_path / "base")
    config = tiny_config(tmp_path / "run", base, shards)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    moved = base.rename(tmp_path / "moved")
    changed = copied(moved, base)
    CHANGES["VAE"](changed)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("[!.]*.*")}
    with pytest.raises(UserError, match=r"run of another base: checkpoint=.*/base .* another VAE;"):
        blackpoint.train.run.fit(config)
    assert {path: path.read_bytes() for path in before} == before
    elsewhere = tiny_config(tmp_path / "run", moved, shards)
    assert blackpoint.train.run.fit(elsewhere) == 0
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "unbroken", moved, shards)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    assert blackpoint.train.run.fit(elsewhere) == 0
    with pytest.raises(UserError, match="run of another base"):  # of a finished run, too
        blackpoint.train.run.fit(config)


def test_a_run_without_a_record_is_adopted_once_where_its_base_was(
    pipeline: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, Path("shards"))
    write_records(RunRecord.read(tmp_path / "run"), config)
    write_identity(tmp_path / "run", data={})
    config.checkpoint = str(copied(pipeline, tmp_path / "copy"))
    with pytest.raises(UserError, match="did not record what its base hold.* continue it once"):
        check_continues(tmp_path / "run", config)
    config.checkpoint = os.path.relpath(pipeline)
    check_continues(tmp_path / "run", config)
    base = base_identity(config)
    assert "did not record what its base hold" in check_same_base(
        RunRecord.read(tmp_path / "run"), base, config
    )
    write_identity(tmp_path / "run", base=base)
    assert read_identity(tmp_path / "run").keys() == {"data", "base"}
    assert check_same_base(RunRecord.read(tmp_path / "run"), base, config) == ""
    assert (tmp_path / "run" / IDENTITY).is_file()


def test_bases_of_pixel_space_models(pipeline: Path, tmp_path: Path) -> None:
    """One has no VAE; a model that is made for the run has a text encoder, or nothing at all."""
    pixel_model("text", pipeline).save(tmp_path / "pixels")
    found = base_identity(config_of(tmp_path / "pixels"))
    assert found.keys() == {"UNet", "text encoder", "tokenizer", "betas", "pixels"}
    change_json(tmp_path / "pixels" / "model_index.json", codec="wavelet")
    now = base_identity(config_of(tmp_path / "pixels"), before=found)
    assert base_differences(found, now) == ["codec or classes (model_index.json)"]
    config = tiny_config(Path("run"), pipeline, Path("shards"))
    config.checkpoint, config.model.text_encoder = None, str(pipeline)
    assert base_identity(config).keys() == {"text encoder", "tokenizer"}
    config.model.text_encoder = None
    assert base_identity(config) == {}


def test_another_class_of_scheduler_is_another_base(pipeline: Path, tmp_path: Path) -> None:
    """Absent keys are those of the class, and classes differ in their betas."""
    folder = shutil.copytree(pipeline, tmp_path / "sd")
    path = folder / "scheduler" / "scheduler_config.json"
    bases = []
    for values in (
        {"_class_name": "HeunDiscreteScheduler"},
        {"_class_name": "HeunDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012},
        {"_class_name": "DDIMScheduler"},
    ):
        path.write_text(json.dumps({"num_train_timesteps": 1000} | values))
        index = folder / "model_index.json"
        change_json(index, scheduler=["diffusers", values["_class_name"]])
        bases.append(base_identity(tiny_config(tmp_path / "run", folder, tmp_path)))
    assert base_differences(bases[0], bases[1]) == []
    assert base_differences(bases[0], bases[2]) == ["betas (scheduler)"]


def test_a_run_that_has_only_its_export_left_to_do_compares_what_is_named_anew(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    values = {"trainer.max_steps": 1}
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **values)) == 0
    shutil.rmtree(tmp_path / "run" / "export")
    other = shutil.copytree(pipeline, tmp_path / "other")
    change_weight(other, "vae")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="another VAE"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", other, shards, **values))
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    shutil.rmtree(other / "tokenizer")
    with pytest.raises(UserError, match="is no whole base|tokenizer is missing"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", other, shards, **values))
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **values)) == 0
    assert (tmp_path / "run" / "export").is_dir()
