"""Laws of a whole run: what it leaves behind, how it stops, and that it resumes exactly."""

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import Resumable, RunFailed, UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.module import FineTuner
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.start import starting_model
from tests.tiny_run import (
    Killed,
    assert_same_run,
    kill,
    load_checkpoint,
    stop_in_step,
    tiny_config,
)


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Path, str]]]:
    """Stands in for the export, which has its own tests, and records what was exported."""
    calls: list[tuple[Path, str]] = []

    def export(checkpoint: Path, output: Path, weights: str) -> None:
        calls.append((checkpoint, weights))
        output.mkdir()

    monkeypatch.setattr(blackpoint.train.run, "export", export)
    yield calls


@pytest.fixture(scope="module")
def unbroken(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing disturbed, with everything switched on but wandb."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
        assert blackpoint.train.run.fit(full_config(run_dir, pipeline, shards)) == 0
    return run_dir


def full_config(run_dir: Path, pipeline: Path, shards: Path, **overrides: Any) -> TrainConfig:
    values = {
        "data.validation_shards": str(shards),
        "preview.every_steps": 3,
        "preview.num_steps": 2,
        "preview.num_images": 2,
        **overrides,
    }
    return tiny_config(run_dir, pipeline, shards, **values)


def test_run_directory_holds_everything(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.yaml", "environment.json", "checkpoints", "metrics.csv"} <= names
    previews = sorted(path.name for path in (unbroken / "previews").iterdir())
    assert previews == [f"step_{step:08d}.png" for step in (0, 3, 6)]
    assert not list(unbroken.rglob("*.tmp"))
    metrics = read_metrics(unbroken / "metrics.csv")
    assert [step for step, _ in metrics["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert all(value > 0 for _, value in metrics["train/gradient_norm"])
    assert all(value > 0 for _, value in metrics["train/images_per_s"])
    rates = [value for _, value in metrics["train/learning_rate"]]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, *[1e-3] * 4])
    assert [step for step, _ in metrics["validation/loss_terminal"]] == [3, 6]
    losses = [value for _, value in metrics["validation/loss"]]
    assert losses[1] < losses[0]


def test_checkpoint_is_plain_and_names_its_base_and_process(unbroken: Path, pipeline: Path) -> None:
    saved = load_checkpoint(unbroken, 6)
    assert saved["blackpoint"]["base"] == str(pipeline.resolve())
    assert saved["blackpoint"]["process"]["rescale_betas_zero_snr"] is True
    assert saved["blackpoint"]["process"]["prediction_type"] == "v_prediction"
    assert all(name.startswith("unet.") for name in saved["state_dict"])
    model = DiffusionModel.load(unbroken / "checkpoints" / "step_00000006.ckpt")
    average = {f"unet.{name}": value for name, value in model.unet.state_dict().items()}
    assert_close(average, dict(saved["state_dict"]), rtol=0, atol=0)
    assert model.process.schedule.is_zero_terminal_snr


def test_a_checkpoint_that_its_run_may_remove_is_named(
    unbroken: Path,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = {"trainer.encoder_dtype": "float32"}
    for path in (unbroken / "checkpoints" / "step_00000006.ckpt", pipeline):
        config = tiny_config(tmp_path / "run", path, shards, **held)
        starting_model(config, torch.device("cpu"))
        told = capsys.readouterr().err
        assert ("its own run removes it when that goes on" in told) == (path != pipeline)


@pytest.mark.parametrize("step", [2, 4])
def test_killed_and_resumed_run_equals_an_unbroken_one(
    unbroken: Path,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    step: int,
) -> None:
    config = full_config(tmp_path / "run", pipeline, shards)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, step, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", unbroken)
    starts = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3 * (step // 3)]


def test_signal_finishes_the_step_saves_and_resumes(
    unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = full_config(tmp_path / "run", pipeline, shards)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Resumable, match="step 4 of 6.*same command"):
            blackpoint.train.run.fit(config)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_finished_run_does_nothing(
    unbroken: Path, pipeline: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert blackpoint.train.run.fit(full_config(unbroken, pipeline, shards)) == 0
    assert "finished: 6 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_other_config_is_refused_with_the_differing_keys(
    unbroken: Path, pipeline: Path, shards: Path
) -> None:
    config = full_config(unbroken, pipeline, shards, **{"optimizer.learning_rate": 2e-3, "seed": 1})
    with pytest.raises(UserError, match="choose another run_dir") as caught:
        blackpoint.train.run.fit(config)
    assert "optimizer.learning_rate: 0.001 there, 0.002 now" in str(caught.value)
    assert "seed: 0 there, 1 now" in str(caught.value)
    assert "ema" not in str(caught.value)
    assert f"(checkpoint={unbroken} run_dir={unbroken}_2 starts a new one" in str(caught.value)


def test_a_key_younger_than_the_run_has_its_default_there(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, Path("base"), Path("shards"))
    before = OmegaConf.structured(config)
    old = OmegaConf.to_container(before)
    assert isinstance(old, dict)
    del old["optimizer"]["beta1"]
    OmegaConf.save(old, tmp_path / "config.yaml")
    check_continues(tmp_path, config)
    config.optimizer.beta1 = 0.5
    with pytest.raises(UserError, match="optimizer.beta1: 0.9 there, 0.5 now"):
        check_continues(tmp_path, config)


def test_parts_of_a_run_without_its_config_are_refused(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.csv").write_text("years of work")
    with pytest.raises(UserError, match="metrics.csv but no run .config.yaml is missing"):
        blackpoint.train.run.fit(tiny_config(tmp_path, pipeline, shards))
    assert (tmp_path / "metrics.csv").read_text() == "years of work"


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint", "nowhere"), ("data.shards", "nowhere"), ("data.resolution", 17)],
)
def test_wrong_input_leaves_no_run_directory(
    pipeline: Path, shards: Path, tmp_path: Path, key: str, value: Any
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **{key: value})
    with pytest.raises(ValueError, match=str(value)):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_of_the_run_directory_is_the_users_to_move(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path / "file" / "run", pipeline, shards)
    with pytest.raises(UserError, match="run_dir=.*Not a directory.*choose another run_dir"):
        blackpoint.train.run.fit(config)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("place", ["check_continues", "RunLock.acquire", "sent_rows"])
def test_a_directory_that_cannot_be_written_to_at_the_start_is_wrong_input(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    place: str,
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number), "/runs/theirs")

    monkeypatch.setattr(f"blackpoint.train.run.{place}", refuse)
    expected = f"run_dir=.*/runs/theirs: {os.strerror(number)}.*get the right to write"
    with pytest.raises(UserError, match=expected):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards))


def test_rights_that_are_lost_later_are_a_failure_of_the_run(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("blackpoint.train.callbacks.metrics.CsvMetrics.log_metrics", refuse)
    with pytest.raises(RunFailed, match="Permission denied.*the same command continues"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards))


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_non_finite_loss_stops_the_run_and_leaves_the_last_good_checkpoint(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    log_every_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FineTuner.predict

    def predict(self: FineTuner, batch: Any, draws: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, target = original(self, batch, draws)
        if self.global_step == 4:
            target[1, 0, 0, 0] = torch.nan
            poisoned.append(batch["key"][1])
        return output, target

    poisoned: list[str] = []
    monkeypatch.setattr(FineTuner, "predict", predict)
    overrides = {"trainer.log_every_steps": log_every_steps}
    with pytest.raises(RunFailed, match="loss of step 5 is not finite for 1 of 4") as caught:
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **overrides))
    assert f": {poisoned[0]}; " in str(caught.value)
    saved = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step_00000003.ckpt"]
    assert all(
        torch.isfinite(value).all()
        for value in load_checkpoint(tmp_path / "run", 3)["state_dict"].values()
    )


def test_no_checkpoint_follows_a_non_finite_loss_that_no_step_has_looked_at(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the loss is looked at when rows are due; saving must look again."""
    from blackpoint.train.callbacks.watch import Watch

    looks: list[str] = []
    original = Watch.check_finite

    def at_saving(self: Watch, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        looks.append("saving")
        original(self, trainer, pl_module)

    monkeypatch.setattr(Watch, "check_finite", lambda self, trainer, pl_module: None)
    monkeypatch.setattr(Watch, "on_save_checkpoint", at_saving)
    predict = FineTuner.predict
    monkeypatch.setattr(
        FineTuner, "predict", lambda self, *a: (predict(self, *a)[0], torch.tensor(torch.nan))
    )
    overrides = {"trainer.log_every_steps": 100, "ema.enabled": False}
    with pytest.raises(RunFailed, match="loss of step 1 is not finite"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **overrides))
    assert looks == ["saving"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_accumulation_equals_the_batch_in_one_piece(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    common = {"trainer.max_steps": 2, "optimizer.epsilon": 1e-3, "trainer.validate_every_steps": 0}
    whole = tiny_config(tmp_path / "whole", pipeline, shards, **common, batch_size=4)
    halves = tiny_config(
        tmp_path / "halves",
        pipeline,
        shards,
        **common,
        **{"batch_size": 2, "trainer.accumulate_grad_batches": 2},
    )
    for config in (whole, halves):
        blackpoint.train.run.fit(config)
    one, two = load_checkpoint(tmp_path / "whole", 2), load_checkpoint(tmp_path / "halves", 2)
    assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"trainer.precision": "bf16-mixed"},
        {"trainer.gradient_checkpointing": True},
        {"trainer.gradient_clip": 0.0},
        {"ema.enabled": False},
        {"loss.prediction_type": "sample"},
        {"loss.prediction_type": "epsilon", "schedule.zero_terminal_snr": False},
    ],
    ids=lambda overrides: ",".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_options_train(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    overrides: dict[str, Any],
    exports: list[tuple[Path, str]],
) -> None:
    config = tiny_config(
        tmp_path / "run", pipeline, shards, **{**overrides, "trainer.max_steps": 1}
    )
    assert blackpoint.train.run.fit(config) == 0
    saved = load_checkpoint(tmp_path / "run", 1)
    assert all(value.dtype == torch.float32 for value in saved["state_dict"].values())
    assert exports == [
        (
            tmp_path / "run" / "checkpoints" / "step_00000001.ckpt",
            "ema" if config.ema.enabled else "raw",
        )
    ]
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").trainer.max_steps == 1


def test_gradient_checkpointing_does_not_change_the_loss(
    unbroken: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    overrides = {"trainer.gradient_checkpointing": True, "trainer.max_steps": 1}
    blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **overrides))
    one, two = (
        read_metrics(d / "metrics.csv")["train/loss"][0] for d in (tmp_path / "run", unbroken)
    )
    assert one[1] == pytest.approx(two[1], rel=1e-5)


def test_half_precision_without_a_gpu_is_refused(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = tiny_config(tmp_path, pipeline, shards, **{"trainer.precision": "16-mixed"})
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        blackpoint.train.run.fit(config)


def test_prompt_embeddings_are_cached_within_a_bound(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DiffusionModel.load(pipeline)
    tuner = FineTuner(model, tiny_config(tmp_path, pipeline, shards))
    captions = ["a red one", "", "a blue two", ""]
    expected = torch.cat([model.encode_prompts([c]).prompt_embeds for c in captions])
    one_embedding = 16 * 32 * 4
    monkeypatch.setattr("blackpoint.train.module.CAPTION_CACHE_BYTES", 2 * one_embedding)
    for _ in range(2):
        assert_close(tuner.embed(captions).prompt_embeds, expected, rtol=0, atol=0)
        assert list(tuner._captions) == ["a blue two", ""]


@pytest.mark.slow
def test_wandb_runs_offline_and_keeps_its_run_id(
    pipeline: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(
        run_dir, pipeline, shards, **{"wandb.enabled": True, "trainer.checkpoint_every_steps": 1}
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 1, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    time.sleep(1.1)  # wandb names its folders by the second
    assert blackpoint.train.run.fit(config) == 0
    assert "wandb is offline" in capsys.readouterr().err
    run_id = (run_dir / "wandb" / "run_id").read_text()
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{run_id}"))) == 2
