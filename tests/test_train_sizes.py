"""Laws of sizes that nobody asked for: the run's, the latents', or the checkpoint's own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

import blackpoint.data.summary
import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.data.index.index import Index
from blackpoint.data.latents import Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from blackpoint.data.summary import enlarged_lines
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.config import OptimizerConfig
from blackpoint.train.config.learning_rate import warmup_note
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.encode.encode import encode
from blackpoint.train.records.checkpoint_size import checkpoint_size
from blackpoint.train.records.run_directory import RunRecord, write_records
from blackpoint.train.records.sizes import sized, steps_of_epochs, with_max_steps
from tests.pixel_models import pixel_model, pixel_train_config
from tests.tiny_encode import encoded
from tests.tiny_run import assert_same_run, tiny_config

OWN_PX = 16
"""What the tiny pipeline is made for: 8 positions of 2 px. The images have it too."""


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


def side_of(run_dir: Path) -> int:
    return read_yaml_file(run_dir / "config.yaml")["data"]["resolution"]


def reader_of(shards: Path, resolution: int) -> Reader:
    return Reader(Index(shards), find_shards(str(shards)), 0, resolution)


def test_a_run_takes_the_size_of_its_checkpoint_and_keeps_it(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unset: dict[str, Any] = {"data.resolution": 0, "trainer.max_steps": 1}
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **unset)) == 0
    assert side_of(tmp_path / "run") == OWN_PX
    told = capsys.readouterr().err
    assert f"data.resolution={OWN_PX}, the size that checkpoint={pipeline} was made for" in told
    assert "enlarged" not in told
    larger = {"data.resolution": 2 * OWN_PX, "trainer.max_steps": 1}
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "old", pipeline, shards, **larger)) == 0
    told = capsys.readouterr().err
    assert f"data.shards={shards}: 12 of 12 images are enlarged to data.resolution=32; " in told
    longer = tiny_config(tmp_path / "old", pipeline, shards, **(unset | {"trainer.max_steps": 2}))
    assert blackpoint.train.run.fit(longer) == 0
    assert side_of(tmp_path / "old") == 2 * OWN_PX
    assert "was made for" not in capsys.readouterr().err


def test_latents_are_made_at_the_size_of_their_checkpoint(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EncodeConfig(
        str(shards), str(pipeline), str(tmp_path / "latents"), num_processes=1, num_workers=0
    )
    assert encode(config).resolution == OWN_PX
    assert Encoding.read(tmp_path / "latents").resolution == OWN_PX
    told = capsys.readouterr().err
    assert f"note: resolution={OWN_PX}, the size that checkpoint={pipeline} was made for" in told
    assert "enlarged" not in told


def test_latents_of_another_size_go_on_and_train_at_theirs(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "latents"
    encoded(shards, pipeline, output, resolution=32)
    told = capsys.readouterr().err
    assert f"source={shards}: 12 of 12 images are enlarged to resolution=32; " in told
    assert encoded(shards, pipeline, output, resolution=0).num_kept_shards > 0
    assert "resolution=32, that of the latents in" in capsys.readouterr().err
    config = tiny_config(tmp_path / "run", pipeline, output, **{"data.resolution": 0})
    assert sized(config, RunRecord(tmp_path / "run")).data.resolution == 32
    told = capsys.readouterr().err
    assert told == f"note: data.resolution=32, the size of the latents of data.shards={output}\n"


def test_pixel_space_models_have_their_own_size(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixel_model("text", pipeline).save(tmp_path / "pixels")
    assert checkpoint_size(str(tmp_path / "pixels"), "x") == 16
    assert DiffusionModel.load(tmp_path / "pixels").image_size == 16
    config = pixel_train_config(tmp_path / "run", shards, "none", **{"data.resolution": 0})
    with pytest.raises(UserError, match="data.resolution=0: a model that is made for the run has"):
        blackpoint.train.run.fit(config)
    write_records(
        RunRecord.read(tmp_path / "run"), pixel_train_config(tmp_path / "run", shards, "none")
    )
    assert sized(config, RunRecord.read(tmp_path / "run")).data.resolution == 16
    assert "data.resolution" not in capsys.readouterr().err


@pytest.mark.parametrize("side", [None, [8, 16], 0])
def test_a_checkpoint_that_does_not_say_one_size_is_asked_for_it(
    side: object, pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(pipeline, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": side}))
    with pytest.raises(UserError, match=r"^resolution=0: .* set resolution, in pixels"):
        checkpoint_size(str(tmp_path / "base"), "resolution")


@pytest.mark.parametrize(
    ("version", "side", "found"),
    [
        ("0.6.0", 32, 64),
        ("0.6.0.dev0", 96, 96),
        ("0.9.0", 32, 32),
        ("0.42.1", 32, 32),
        (None, 8, 8),
    ],
)
def test_a_size_of_early_diffusers_is_what_its_pipeline_corrects_it_to(
    version: str | None, side: int, found: int, pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(pipeline, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"sample_size": side, "_diffusers_version": version}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    pixels = 2 * found  # the tiny autoencoder's factor
    assert checkpoint_size(str(tmp_path / "base"), "resolution") == pixels
    assert DiffusionModel.load(tmp_path / "base").image_size == pixels
    if version:
        stock = StableDiffusionPipeline.from_pretrained(
            tmp_path / "base", safety_checker=None, local_files_only=True
        )
        assert stock.unet.config.sample_size == found


def test_another_kind_of_pipeline_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="is a FluxPipeline"):
        checkpoint_size(str(tmp_path), "resolution")


def test_the_images_of_a_large_index_are_counted_by_pieces(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = "data.resolution=17; lower it"
    (exact,) = enlarged_lines("data.shards=x", reader_of(shards, OWN_PX + 1), what)
    assert exact == f"WARNING: data.shards=x: 12 of 12 images are enlarged to {what}"
    assert enlarged_lines("data.shards=x", reader_of(shards, OWN_PX), what) == []
    monkeypatch.setattr(blackpoint.data.summary, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(blackpoint.data.summary, "MAX_ROWS", 4)
    looked: list[int] = []
    read, reader = Index.read, reader_of(shards, OWN_PX + 1)  # which may compare fresh shards
    monkeypatch.setattr(
        Index, "read", lambda *args: looked.append(args[2] - args[1]) or read(*args)
    )
    (about,) = enlarged_lines("data.shards=x", reader, what)
    assert "about 12 of 12 images" in about
    assert sum(looked) == 4


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(2, 6, None), (6, 6, "8.57e-06"), (500, 100, "2e-06")],
)
def test_a_warm_up_that_is_longer_than_the_run_is_said(
    warmup: int, steps: int, expected: str | None
) -> None:
    note = warmup_note(OptimizerConfig(learning_rate=1e-5, warmup_steps=warmup), steps)
    assert (expected is None) == (note == "")
    if expected:
        assert f"rises to {expected} and never reaches optimizer.learning_rate=1e-05" in note


def test_a_run_says_that_its_warm_up_is_longer(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"trainer.max_steps": 1, "optimizer.warmup_steps": 3}
    assert blackpoint.train.run.fit(tiny_config(tmp_path, pipeline, shards, **values)) == 0
    told = capsys.readouterr().err
    assert told.index("optimizer.warmup_steps=3 is no less than") < told.index("step 1/1")


def test_epochs_without_an_index_are_refused_in_every_process(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns("index"))
    config = tiny_config(tmp_path, Path("sd"), tmp_path / "shards", **{"trainer.max_epochs": 1})
    with pytest.raises(UserError, match="has no index, and 2 processes that were started at once"):
        with_max_steps(config, tmp_path / "run", num_started=2)


def test_epochs_are_the_steps_that_they_come_to(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twelve images in steps of four."""
    options = {"trainer.max_epochs": 1, "trainer.validate_every_steps": 0}
    config = tiny_config(tmp_path / "run", pipeline, shards, **options)
    assert blackpoint.train.run.fit(config) == 0
    assert "max_epochs=1: trainer.max_steps=3, of 4 of 12 images" in capsys.readouterr().err
    plain = tiny_config(tmp_path / "plain", pipeline, shards, **{"trainer.max_steps": 3})
    assert blackpoint.train.run.fit(plain) == 0
    assert_same_run(tmp_path / "run", tmp_path / "plain", step=3)
    with monkeypatch.context() as patch:  # a finished run counts nothing again
        patch.setattr(CaptionedImages, "prepare_data", lambda self: pytest.fail("read the data"))
        assert blackpoint.train.run.fit(config) == 0
    assert "finished: 3 steps" in capsys.readouterr().err
    for part, steps in ((0.1, 1), (1.01, 4)):
        trainer = replace(config.trainer, max_epochs=part)
        assert steps_of_epochs(replace(config, trainer=trainer), 12) == steps
    with pytest.raises(UserError, match="trainer.max_epochs=0.* must be > 0"):
        tiny_config(tmp_path, pipeline, shards, **{"trainer.max_epochs": 0})
