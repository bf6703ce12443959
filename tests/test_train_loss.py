"""Laws of the training loss, and of a training step with each of its options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.prediction import add_noise, training_target, v_to_x0
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.callbacks.snr_bins import snr_bins
from blackpoint.train.draws import draw
from blackpoint.train.loss import squared_error
from blackpoint.train.loss_config import LossConfig
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.tiny_run import make_tiny_shards, tiny_config, tiny_tuner

SHAPE = (4, 8, 8)
SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()


def test_loss_of_the_exact_target_is_zero() -> None:
    target = torch.randn(3, *SHAPE)
    assert_close(squared_error(target, target), torch.zeros(3), rtol=0, atol=0)


def test_loss_is_the_mean_square_of_each_sample() -> None:
    target = torch.zeros(2, *SHAPE)
    output = torch.stack([torch.full(SHAPE, 2.0), torch.full(SHAPE, -3.0)])
    assert_close(squared_error(output, target), torch.tensor([4.0, 9.0]))


def test_loss_is_float32_whatever_the_network_runs_in() -> None:
    output, target = torch.full((1, *SHAPE), 300.0).half(), torch.zeros(1, *SHAPE)
    loss = squared_error(output, target)  # 300^2 is beyond float16
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor([90000.0]))


def test_target_at_the_last_step_is_minus_x0() -> None:
    x0, eps = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    alpha, sigma = ZERO_SNR.at(torch.tensor([999]))
    target = training_target("v_prediction", x0, eps, alpha, sigma)
    assert_close(target, -x0, rtol=0, atol=0)
    assert_close(add_noise(x0, eps, alpha, sigma), eps, rtol=0, atol=0)
    assert_close(v_to_x0(target, eps, alpha, sigma), x0, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [SD, ZERO_SNR, NoiseSchedule.cosine_discrete()])
def test_snr_bins_are_a_partition_with_the_last_step_by_itself(schedule: NoiseSchedule) -> None:
    bins = snr_bins(schedule)
    assert list(bins)[-1] == "terminal" and bins["terminal"] == (999, 1000)
    assert [low for low, _ in bins.values()][1:] == [high for _, high in bins.values()][:-1]
    assert next(iter(bins.values()))[0] == 0
    for name, (low, high) in bins.items():
        if name != "terminal":
            lower, upper = map(float, name.removeprefix("log_snr_").split("_"))
            assert (
                (schedule.log_snr[low:high] >= lower) & (schedule.log_snr[low:high] < upper)
            ).all()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("floor", -0.1, ">= 0 and <= 1"),
        ("floor", 1.5, ">= 0 and <= 1"),
        ("snr_gamma", 0.0, "> 0"),
        ("p2_k", 0.0, "> 0"),
        ("p2_gamma", -1.0, ">= 0"),
        ("sigmoid_bias", float("inf"), ">= -20 and <= 20"),
        ("uncertainty_learning_rate", 0.0, "> 0"),
        ("terminal_share", 1.0, ">= 0 and < 1"),
        ("offset_noise", -0.1, ">= 0"),
        ("input_perturbation", float("nan"), ">= 0"),
    ],
)
def test_options_out_of_range_are_refused(field: str, value: float, rule: str) -> None:
    with pytest.raises(UserError, match=f"loss.{field}={value} is out of range; it must be {rule}"):
        LossConfig(**{field: value})


def batch_of(numbers: list[int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(numbers), 3, 16, 16), generator=generator)
    return {
        "image": images.to(torch.uint8),
        "caption": ["a black background", "a photo of snow", ""][: len(numbers)],
        "key": [str(number) for number in numbers],
        "epoch": torch.zeros(len(numbers), dtype=torch.long),
        "index": torch.tensor(numbers),
        "position": torch.tensor(numbers),
    }


class Killed(Exception):
    """Stands in for SIGKILL."""


OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss.weighting": "min_snr"},
    {"loss.weighting": "soft_min_snr", "loss.floor": 0.3},
    {"loss.weighting": "p2", "loss.prediction_type": "sample"},
    {"loss.weighting": "sigmoid", "loss.uncertainty": True},
    {"loss.timesteps": "stratified", "loss.terminal_share": 0.9},
    {"loss.input_perturbation": 0.1},
    {"loss.offset_noise": 0.1, "schedule.zero_terminal_snr": False},
]


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
def test_two_steps_with_each_option_are_finite_and_move_the_weights(
    pipeline: Path, overrides: dict[str, Any]
) -> None:
    module = tiny_tuner(pipeline, **overrides)
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    before = module.unet.conv_in.weight.clone()
    for step in range(2):
        outputs = module.training_step(batch_of([3 * step, 3 * step + 1, 3 * step + 2]), step)
        assert outputs["losses"].shape == (3,) and torch.isfinite(outputs["losses"]).all()
        assert_close(outputs["loss"].detach(), outputs["objective"], rtol=0, atol=0)
        optimizer.zero_grad()
        outputs["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        optimizer.step()
    assert not torch.equal(before, module.unet.conv_in.weight)


def test_by_default_the_objective_is_the_mean_squared_error_bit_for_bit(pipeline: Path) -> None:
    module = tiny_tuner(pipeline)
    outputs = module.training_step(batch_of([0, 1, 2]), 0)
    assert torch.equal(outputs["loss"], outputs["losses"].mean())
    assert [name for name, _ in module.named_children()] == ["unet"]


def test_the_logged_losses_have_neither_weight_nor_uncertainty(pipeline: Path) -> None:
    plain = tiny_tuner(pipeline).training_step(batch_of([0, 1, 2]), 0)
    other = tiny_tuner(pipeline, **{"loss.weighting": "min_snr", "loss.uncertainty": True})
    outputs = other.training_step(batch_of([0, 1, 2]), 0)
    assert_close(outputs["losses"], plain["losses"], rtol=0, atol=0)
    assert not torch.equal(outputs["objective"], plain["objective"])


@pytest.mark.parametrize("overrides", OPTIONS[:5], ids=str)
def test_the_last_timestep_is_trained_under_every_weight(
    pipeline: Path, overrides: dict[str, Any]
) -> None:
    """The gradient of the objective at t = T - 1 is w(T-1) > 0 times that of the plain loss."""
    module = tiny_tuner(pipeline, **overrides)
    losses = torch.tensor([0.7, 0.9], requires_grad=True)
    objective = module.objective(losses, torch.tensor([999, 999]))
    (gradient,) = torch.autograd.grad(objective.sum(), losses)
    assert (gradient > 0).all()
    assert_close(gradient.double(), module.weights[999].expand(2))


def test_an_ideal_answer_at_the_last_timestep_survives_input_perturbation(pipeline: Path) -> None:
    """The target there is -x0 whatever the noise, so answering -x0 costs nothing."""
    module = tiny_tuner(pipeline, **{"loss.input_perturbation": 0.5})
    loss = module.config.loss
    draws = draw(0, [0], [0], SHAPE, 1000, loss=loss)
    x0 = torch.randn(1, *SHAPE)
    alpha, sigma = ZERO_SNR.at(torch.tensor([999]))
    x_t = add_noise(x0, draws.perturbed(draws.eps), alpha, sigma)
    assert not torch.equal(x_t, draws.eps)
    target = training_target("v_prediction", x0, draws.eps, alpha, sigma)
    assert squared_error(-x0, target).item() == 0


def test_uncertainty_is_trained_by_the_same_optimizer_without_weight_decay(pipeline: Path) -> None:
    module = tiny_tuner(pipeline, **{"loss.uncertainty": True})
    optimizer: Any = module.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
    unet, uncertainty = optimizer.param_groups
    assert len(unet["params"]) == len(list(module.unet.parameters()))
    assert uncertainty["params"] == list(module.uncertainty.parameters())  # type: ignore[union-attr]
    assert (unet["weight_decay"], uncertainty["weight_decay"]) == (0.01, 0.0)
    assert uncertainty["initial_lr"] == 1e-3


def test_killed_and_resumed_run_with_every_option_equals_an_unbroken_one(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_tiny_shards(tmp_path / "images")
    overrides = {
        "loss.weighting": "min_snr",
        "loss.uncertainty": True,
        "loss.timesteps": "stratified",
        "loss.terminal_share": 0.2,
        "loss.input_perturbation": 0.1,
        "trainer.max_steps": 2,
        "trainer.checkpoint_every_steps": 1,
        "trainer.validate_every_steps": 0,
    }
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    runs = [tmp_path / "unbroken", tmp_path / "resumed"]
    original = FineTuner.training_step

    def killed(self: FineTuner, batch: Any, batch_index: int) -> Any:
        if self.global_step == 1:
            raise Killed
        return original(self, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "training_step", killed)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(tiny_config(runs[1], pipeline, shards, **overrides))
    assert not (runs[1] / "export").exists()
    for run_dir in runs:
        assert blackpoint.train.run.fit(tiny_config(run_dir, pipeline, shards, **overrides)) == 0
    name = "checkpoints/step_00000002.ckpt"
    one, two = (torch.load(run_dir / name, weights_only=True) for run_dir in runs)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert_close(one[key], two[key], rtol=0, atol=0)
    learned = one["current_model_state"]["uncertainty.coefficients"]
    assert (learned != 0).all()
    rows = [read_metrics(run_dir / "metrics.csv")["train/loss"] for run_dir in runs]
    assert rows[0] == rows[1]
    model = DiffusionModel.load(runs[0] / name)  # what is sampled and exported has the UNet only
    assert set(model.unet.state_dict()) == {
        key.removeprefix("unet.") for key in one["state_dict"] if not key.startswith("uncertainty.")
    }
    assert OmegaConf.load(runs[0] / "config.yaml").loss.weighting == "min_snr"
