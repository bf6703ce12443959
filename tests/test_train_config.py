"""What a train config refuses, and the process that it asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import learning_rate_factor
from blackpoint.train.target_process import fine_tuned_process
from tests.tiny_run import tiny_config

SD = Process(NoiseSchedule.scaled_linear(), "epsilon", "leading")


def config(**overrides: Any) -> TrainConfig:
    return tiny_config(Path("run"), Path("base"), Path("shards"), **overrides)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss.prediction_type", "epsilon", "v_prediction"),
        ("schedule.timestep_spacing", "leading", "trailing"),
        ("batch_size", 0, "batch_size=0"),
        ("trainer.devices", 3, "batch_size=4 cannot be divided among 3"),
        ("trainer.max_steps", 0, "trainer.max_steps=0"),
        ("trainer.gradient_clip", -1.0, "trainer.gradient_clip=-1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate=0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan"),
        ("optimizer.beta2", 1.0, "optimizer.beta2=1"),
        ("ema.decay", 1.0, "ema.decay=1"),
        ("preview.num_steps", 0, "preview.num_steps=0"),
    ],
)
def test_config_refuses(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**{key: value})


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss.prediction_type": "epsilon", "allow_unsound": True},
        {"schedule.timestep_spacing": "leading", "allow_unsound": True},
        {"loss.prediction_type": "epsilon", "schedule.zero_terminal_snr": False},
        {"loss.prediction_type": "sample"},
    ],
)
def test_config_allows(overrides: dict[str, Any]) -> None:
    config(**overrides)


def test_epsilon_base_becomes_a_zero_snr_v_model_by_default() -> None:
    process = fine_tuned_process(config(), SD)
    assert process.schedule.is_zero_terminal_snr
    assert (process.prediction_type, process.timestep_spacing) == ("v_prediction", "trailing")
    expected = NoiseSchedule.scaled_linear().zero_terminal_snr().alpha_bar
    assert_close(process.schedule.alpha_bar, expected, rtol=0, atol=0)


@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "cosine_discrete"])
@pytest.mark.parametrize("zero_terminal_snr", [True, False])
def test_process_survives_the_scheduler_config(betas: str, zero_terminal_snr: bool) -> None:
    overrides = {"schedule.betas": betas, "schedule.zero_terminal_snr": zero_terminal_snr}
    process = fine_tuned_process(config(**overrides), SD)
    written = process.to_diffusers()
    again = Process.from_diffusers(written)
    assert_close(again.schedule.alpha_bar, process.schedule.alpha_bar, rtol=1e-9, atol=1e-12)
    assert written["trained_betas"] is None  # a stock scheme says it all
    assert torch.equal(again.schedule.alpha_bar == 0, process.schedule.alpha_bar == 0)


def test_zero_snr_base_refuses_epsilon_where_the_config_alone_cannot_tell() -> None:
    base = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
    overrides = {"loss.prediction_type": "epsilon", "schedule.zero_terminal_snr": False}
    with pytest.raises(UserError, match="zero terminal SNR"):
        fine_tuned_process(config(**overrides), base)


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_the_learning_rate_rises_then_falls_to_zero_at_the_last_step(decay: str) -> None:
    settings = config(**{"optimizer.decay": decay, "optimizer.warmup_steps": 4}).optimizer
    factors = [learning_rate_factor(step, settings, 104) for step in range(105)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[54] == pytest.approx({"none": 1.0}.get(decay, 0.5))
    assert factors[104] == pytest.approx({"none": 1.0}.get(decay, 0.0), abs=1e-12)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(200, settings, 104) == factors[104]
    at_once = config(**{"optimizer.decay": decay, "optimizer.warmup_steps": 0}).optimizer
    assert learning_rate_factor(0, at_once, 1) == 1.0
