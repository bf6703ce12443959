"""Laws of the exports that a run writes on its way: whole, the newest few, whatever stops it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import whole_folder
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.measurements.make_random_base import RandomBaseConfig, make
from blackpoint.train.callbacks import exports
from blackpoint.train.callbacks.checkpoints import checkpoint_steps
from tests.tiny_run import Killed, kill, load_checkpoint, stop_in_step, tiny_config
from tests.tiny_single_file import make_folder, tensors_of, write_file
from tests.waiting import names_in

EVERY_TWO: dict[str, Any] = {
    "export.every_steps": 2,
    "export.keep": 2,
    "trainer.keep_checkpoints": 9,
    "trainer.validate_every_steps": 0,
}


@pytest.fixture(autouse=True)
def last_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the export at the end, which has its own tests."""
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, **options: output.mkdir()
    )


def steps_in(run_dir: Path) -> list[str]:
    return names_in(run_dir / "exports")


@pytest.mark.parametrize("averaged", [True, False])
def test_a_run_keeps_the_newest_exports_of_its_checkpoints(
    averaged: bool, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, pipeline, shards, **EVERY_TWO, **{"ema.enabled": averaged})
    assert blackpoint.train.run.fit(config) == 0
    assert steps_in(tmp_path) == ["step_00000004", "step_00000006"]
    assert list(checkpoint_steps(tmp_path / "checkpoints")) == [2, 3, 4, 6]
    for step in (4, 6):
        model = DiffusionModel.load(tmp_path / "exports" / f"step_{step:08d}")
        saved = load_checkpoint(tmp_path, step)["state_dict"]
        state = {f"unet.{name}": value for name, value in model.unet.state_dict().items()}
        assert_close(state, dict(saved), rtol=0, atol=0)
        assert model.process.schedule.is_zero_terminal_snr


def test_a_run_of_adapters_exports_their_files(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """Merged by two lines of our own they are the checkpoint, but for the rounding of a sum."""
    values = EVERY_TWO | {"export.format": "lora", "export.keep": 1, "lora.rank": 2}
    run_dir = tmp_path / "run"
    assert blackpoint.train.run.fit(tiny_config(run_dir, pipeline, shards, **values)) == 0
    assert steps_in(run_dir) == ["step_00000006"]
    trained = DiffusionModel.load(run_dir / "checkpoints" / "step_00000006.ckpt").unet.state_dict()
    base = DiffusionModel.load(pipeline).unet.state_dict()
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ends = ("lora_up.weight", "lora_down.weight", "alpha")
    files = (run_dir / "exports/step_00000006/step_00000006", run_dir / "export_lora/export_lora")
    for file in files:
        stored = load_file(file.with_suffix(".safetensors"))
        up, down, alpha = (stored[f"lora_unet_{module.replace('.', '_')}.{end}"] for end in ends)
        merged = base[f"{module}.weight"] + alpha / 2 * up @ down
        assert_close(merged, trained[f"{module}.weight"], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_run_exports_single_files(shards: Path, tmp_path: Path) -> None:
    """Of the blocks of SD 1.5; and again where a kill had left what lies beside such a file."""
    make(RandomBaseConfig("small", str(tmp_path / "sd")))
    values = EVERY_TWO | {"export.format": "file", "trainer.max_steps": 2, "lora.rank": 2}
    values |= {"data.resolution": 64}
    run_dir = tmp_path / "run"
    config = tiny_config(run_dir, tmp_path / "sd", shards, **values)
    assert blackpoint.train.run.fit(config) == 0
    names = [f"step_00000002.{end}" for end in ("safetensors", "txt", "yaml")]
    assert steps_in(run_dir) == names
    stored = load_file(run_dir / "exports" / names[0])
    trained = DiffusionModel.load(run_dir / "checkpoints" / "step_00000002.ckpt").unet.state_dict()
    weight = stored["model.diffusion_model.middle_block.1.proj_in.weight"]
    assert torch.equal(weight, trained["mid_block.attentions.0.proj_in.weight"].half())
    (run_dir / "exports" / names[0]).unlink()
    exports.export_step(config, run_dir, 2)
    assert steps_in(run_dir) == names


def test_a_base_that_does_not_say_what_it_predicts_needs_not_to(
    shards: Path, tmp_path: Path
) -> None:
    """Training asks for no prediction type, so neither does its check of what it will export."""
    tensors = tensors_of(make_folder(tmp_path / "sd2", "sd2"))
    file = write_file(tmp_path / "sd2.safetensors", tensors)
    config = tiny_config(tmp_path / "run", file, shards, **EVERY_TWO, **{"export.format": "file"})
    exports.check_exports(config, DiffusionModel.load(file, undecided="v_prediction"))


def test_a_model_that_no_single_file_holds_is_refused_at_the_start(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    values = EVERY_TWO | {"export.format": "file"}
    with pytest.raises(UserError, match=r"export\.format=file: .* use export\.format=folder$"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **values))
    assert not (tmp_path / "run").exists()


def killed_in(export: Callable[..., Any], step: int) -> Callable[..., Any]:
    """Returns an export that is killed in the middle of that step's folder."""

    def stopped(checkpoint: Path, output: Path, **options: Any) -> Any:
        if checkpoint.stem == f"step_{step:08d}":
            output.parent.mkdir(exist_ok=True)
            with whole_folder(output) as folder:
                (folder / "unet").mkdir()
                folder.parent.rename(output.parent / ".partial-elsewhere-1-half")
                kill()
        return export(checkpoint, output, **options)

    return stopped


@pytest.mark.parametrize("step", [2, 4, 6])
def test_an_export_that_a_kill_cut_off_is_made_at_the_next_start(
    step: int, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, pipeline, shards, **EVERY_TWO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "export", killed_in(exports.export, step))
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert f"step_{step:08d}" not in steps_in(tmp_path)
    assert ".partial-elsewhere-1-half" in steps_in(tmp_path)
    assert max(checkpoint_steps(tmp_path / "checkpoints")) == step
    if step == 2:  # and is made before the next step, which is killed too
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(patch, 2, kill)
            with pytest.raises(Killed):
                blackpoint.train.run.fit(config)
        assert steps_in(tmp_path) == ["step_00000002"]
    assert blackpoint.train.run.fit(config) == 0
    assert steps_in(tmp_path) == ["step_00000004", "step_00000006"]


def test_what_is_removed_loses_its_name_first(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path) -> None:
        next(path.iterdir()).unlink()
        kill()

    config = tiny_config(tmp_path, pipeline, shards, **(EVERY_TWO | {"export.keep": 1}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            exports.export_step(config, _with_exports(tmp_path), 2)
    assert steps_in(tmp_path) == [".removed-step_00000001.tmp", "step_00000002", "step_x"]
    exports.remove_partial_exports(tmp_path)
    assert steps_in(tmp_path) == ["step_00000002", "step_x"]


def _with_exports(run_dir: Path) -> Path:
    for name in ("step_00000001", "step_00000002", "step_x"):
        (run_dir / "exports" / name).mkdir(parents=True)
        (run_dir / "exports" / name / "README.md").touch()
    return run_dir


def test_a_process_that_no_export_holds_is_refused_at_the_start(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    values = {"loss.prediction_type": "epsilon", "allow_unsound": True, "loss.weighting": "uniform"}
    config = tiny_config(tmp_path / "run", pipeline, shards, **EVERY_TWO, **values)
    with pytest.raises(UserError, match=r"export\.every_steps=2: must be 0, for epsilon-predictio"):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"export.every_steps": -1}, r"export\.every_steps=-1 is out of range"),
        ({"export.keep": 0}, r"export\.keep=0 is out of range"),
        ({"export.format": "lora"}, r"export\.format=lora needs adapters"),
        (
            {"export.format": "lora", "lora.rank": 2, "lora.dora": True},
            r"export\.format=lora needs adapters, lora\.rank, and none of DoRA",
        ),
    ],
)
def test_exports_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(Path("run"), Path("sd"), Path("shards"), **values)
