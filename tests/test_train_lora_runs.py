"""Laws of whole runs of adapters: killed, on several processes, on cached latents, exported."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.sampling.conditioning import Conditioning
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.records.metrics_file import read_metrics
from tests.test_train_checkpoints import without_export_but
from tests.test_train_lora import without_exports
from tests.test_train_processes import start
from tests.tiny_encode import encoded
from tests.tiny_run import assert_same_run, load_checkpoint, stop_in_step, tiny_config, tiny_tuner
from tests.waiting import PATIENCE_S
from tests.warm_verb import WarmVerb

LORA: dict[str, Any] = {"lora.rank": 4, "lora.alpha": 2.0, "lora.dropout": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "default layers": LORA,
    "convolutions": LORA | {"lora.convolutions": True},
    "DoRA": LORA | {"lora.convolutions": True, "lora.dora": True},
}


def output_of(model: DiffusionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    condition = Conditioning(torch.randn(2, 16, 32, generator=generator))
    with torch.no_grad():
        return model.network(x, torch.tensor([10, 999]), condition)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k != "convolutions" else []) for k in KINDS],
)
def test_a_run_is_sampled_as_it_was_trained(
    kind: str, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """Merged into the base, average and weights compute what peft's layers did in training.

    Both round in float32: 1e-5 is about 100 roundings of an output of size 1.
    """
    values = {**KINDS[kind], "optimizer.learning_rate": 1e-2}
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, shards, **values)) == 0
    base = DiffusionModel.load(pipeline)
    for weights, state in (("ema", "state_dict"), ("raw", "current_model_state")):
        tuner = tiny_tuner(pipeline, **values)
        tuner.load_state_dict(load_checkpoint(tmp_path / "run", 6)[state])
        tuner.model.unet.eval()
        trained = output_of(tuner.model)
        checkpoint = tmp_path / "run" / "checkpoints" / "step_00000006.ckpt"
        loaded = DiffusionModel.load(checkpoint, weights=weights)  # type: ignore[arg-type]
        assert_close(output_of(loaded), trained, rtol=1e-5, atol=1e-5)
        assert loaded.process.schedule.is_zero_terminal_snr
        assert (trained - output_of(base)).abs().max() > 1e-3
        if weights == "ema":
            exported = DiffusionModel.load(tmp_path / "run" / "export")
            assert_close(output_of(exported), trained, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "run" / "export_lora").exists() == (kind != "DoRA")


def test_cached_latents_train_the_adapters_that_images_do(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exports(monkeypatch)
    encoded(shards, pipeline, tmp_path / "latents")
    for name, data in (("images", shards), ("cached", tmp_path / "latents")):
        assert blackpoint.train.run.fit(tiny_config(tmp_path / name, pipeline, data, **LORA)) == 0
    one, two = (
        read_metrics(tmp_path / n / "metrics.csv")["train/loss"] for n in ("images", "cached")
    )
    # Latents are kept in 16 bits: docs/latent_cache.md.
    assert_close([loss for _, loss in two], [loss for _, loss in one], rtol=1e-2, atol=1e-3)


class Killing:
    """Ends its process in the step that follows `step`; can be pickled."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        without_export_but(
            stop_in_step,
            pytest.MonkeyPatch(),
            self.step,
            lambda: os.kill(os.getpid(), signal.SIGKILL),
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default layers", "DoRA"])
def test_a_run_killed_five_times_ends_with_the_same_bits(
    kind: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exports(monkeypatch)
    values = KINDS[kind] | {
        "trainer.max_steps": 14,
        "trainer.checkpoint_every_steps": 2,
        "data.validation_shards": str(shards),
    }
    unbroken = tiny_config(tmp_path / "unbroken", pipeline, shards, **values)
    assert blackpoint.train.run.fit(unbroken) == 0
    config = tiny_config(tmp_path / "run", pipeline, shards, **values)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    for step in (1, 4, 5, 9, 12):
        process = WarmVerb("train", str(yaml), before=Killing(step))
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken", step=14)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes gradients are summed in another order: rounding, which Adam divides by."""
    without_exports(monkeypatch)
    values = LORA | {"export.every_steps": 3}
    together = start(tmp_path / "run2", pipeline, shards, 6, **values)
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "run1", pipeline, shards, **values)) == 0
    assert together.wait(PATIENCE_S) == 0
    metrics = [read_metrics(tmp_path / name / "metrics.csv") for name in ("run1", "run2")]
    for name in ("train/loss", "train/gradient_norm"):
        one, two = metrics[0][name], metrics[1][name]
        assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
        assert_close([value for _, value in two], [v for _, v in one], rtol=1e-4, atol=1e-6)
    names = [sorted(p.name for p in (tmp_path / n / "exports").iterdir()) for n in ("run1", "run2")]
    assert names == [["step_00000003", "step_00000006"]] * 2
