"""Laws of the loss weights: what was published, in v-space, and positive at the last timestep."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.prediction import add_noise, to_eps, to_x0
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.measurements import plot_loss_weights
from blackpoint.train.loss_config import LossConfig
from blackpoint.train.loss_weights import sigmoid
from blackpoint.train.target_process import fine_tuned_process
from blackpoint.train.weighting import check_sound, floor_of, loss_weights, v_weights
from tests.tiny_run import tiny_config

SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
SCHEDULES = {"sd": SD, "zero_snr": ZERO_SNR, "cosine": NoiseSchedule.cosine_discrete()}
NOT_UNIFORM = ("min_snr", "soft_min_snr", "p2", "sigmoid")
EXACT = {"rtol": 1e-12, "atol": 0.0}


def weight(weighting: str, **options: Any) -> LossConfig:
    return LossConfig(weighting=weighting, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("output", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_uniform_is_exactly_one_for_every_output(schedule: NoiseSchedule, output: Any) -> None:
    weights = loss_weights(LossConfig(prediction_type=output, floor=0.5), schedule)
    assert torch.equal(weights, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("output", ["v_prediction", "sample"])
@pytest.mark.parametrize("weighting", NOT_UNIFORM)
@pytest.mark.parametrize("floor", [None, 0.02])
def test_the_last_timestep_of_a_zero_snr_schedule_keeps_the_floor(
    output: Any, weighting: str, floor: float | None
) -> None:
    loss = weight(weighting, prediction_type=output, floor=floor)
    weights = loss_weights(loss, ZERO_SNR)
    assert weights.dtype == torch.float64
    assert torch.isfinite(weights).all() and (weights > 0).all()
    assert v_weights(loss, ZERO_SNR)[-1] == 0  # what was published vanishes there
    assert (
        weights[-1] == floor_of(loss, ZERO_SNR) == (floor or v_weights(loss, ZERO_SNR).mean() / 3)
    )
    assert_close(weights.float()[-1].item(), weights[-1].item())


@pytest.mark.parametrize("weighting", NOT_UNIFORM)
def test_without_zero_snr_the_weight_is_as_published(weighting: str) -> None:
    loss = weight(weighting)
    assert_close(loss_weights(loss, SD), v_weights(loss, SD), rtol=0, atol=0)
    assert (v_weights(loss, SD) > 0).all()


@pytest.mark.parametrize("schedule", [SD, SCHEDULES["cosine"]], ids=["sd", "cosine"])
def test_weights_of_eps_and_x0_errors_are_the_published_ones(schedule: NoiseSchedule) -> None:
    snr = schedule.snr

    def of(weighting: str, output: Any, **options: Any) -> torch.Tensor:
        return loss_weights(weight(weighting, prediction_type=output, **options), schedule)

    capped = snr.clamp(max=5)
    assert_close(of("min_snr", "v_prediction"), capped / (snr + 1), **EXACT)
    assert_close(of("min_snr", "epsilon"), capped / snr, rtol=1e-9, atol=0)
    assert_close(of("min_snr", "sample"), capped, rtol=1e-9, atol=0)
    assert_close(of("soft_min_snr", "sample", snr_gamma=4.0), 4 * snr / (snr + 4), **EXACT)
    assert_close(of("p2", "epsilon", p2_k=2.0, p2_gamma=0.5), (2 + snr) ** -0.5, **EXACT)
    expected = torch.sigmoid(-1.5 - schedule.log_snr)
    assert_close(of("sigmoid", "epsilon", sigmoid_bias=-1.5), expected, **EXACT)


def test_soft_min_snr_and_p2_are_sigmoid_weights() -> None:
    soft = v_weights(weight("soft_min_snr", snr_gamma=4.0), ZERO_SNR)
    assert_close(soft, sigmoid(ZERO_SNR, math.log(4)), rtol=1e-9, atol=1e-15)
    p2 = v_weights(weight("p2", p2_k=0.5), ZERO_SNR)
    assert_close(p2, sigmoid(ZERO_SNR, math.log(0.5)) / 0.5, rtol=1e-9, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(0, 998),
    weighting=st.sampled_from(NOT_UNIFORM),
    output=st.sampled_from(["epsilon", "sample"]),
    floor=st.sampled_from([None, 0.0, 0.1]),
    where=st.sampled_from(["noisy", "everywhere"]),
)
def test_a_weighted_loss_is_the_same_number_in_every_space(
    t: int, weighting: str, output: Any, floor: float | None, where: Any
) -> None:
    """w_v |v - v'|^2 = w_eps |eps - eps'|^2 = w_x0 |x0 - x0'|^2 for the same prediction v'."""
    generator = torch.Generator().manual_seed(t)
    x0, eps, error = torch.randn(3, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
    alpha, sigma = SD.alpha[t], SD.sigma[t]
    x_t = add_noise(x0, eps, alpha, sigma)
    v = alpha * eps - sigma * x0 + error
    read, truth = (to_eps, eps) if output == "epsilon" else (to_x0, x0)
    own_error = read("v_prediction", v, x_t, alpha, sigma) - truth
    options = {"floor": floor, "floor_where": where}
    of_v = loss_weights(weight(weighting, **options), SD)[t]
    of_own = loss_weights(weight(weighting, prediction_type=output, **options), SD)[t]
    ours, theirs = of_v * error.square().mean(), of_own * own_error.square().mean()
    assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_min_snr_switches_off_the_share_of_the_schedule_that_is_on_record() -> None:
    weights = v_weights(weight("min_snr"), ZERO_SNR)
    assert (weights < 0.01).double().mean().item() == pytest.approx(0.163, abs=5e-4)
    assert weights.mean().item() == pytest.approx(0.2776, abs=5e-5)


@pytest.mark.parametrize("weighting", NOT_UNIFORM)
def test_a_vanishing_weight_is_refused_with_zero_snr(weighting: str) -> None:
    with pytest.raises(UserError, match=rf"loss.floor=0 with loss.weighting={weighting} and zero"):
        check_sound(weight(weighting, floor=0.0), ZERO_SNR)
    check_sound(weight(weighting, floor=0.0), SD)
    check_sound(weight(weighting, floor=0.0), ZERO_SNR, allow_unsound=True)
    check_sound(weight(weighting), ZERO_SNR)
    check_sound(LossConfig(floor=0.0), ZERO_SNR)


def test_offset_noise_is_refused_with_zero_snr_and_input_perturbation_is_not() -> None:
    with pytest.raises(UserError, match="loss.offset_noise=0.1 with zero terminal SNR.*must be 0"):
        check_sound(LossConfig(offset_noise=0.1), ZERO_SNR)
    check_sound(LossConfig(offset_noise=0.1), SD)
    check_sound(LossConfig(offset_noise=0.1), ZERO_SNR, allow_unsound=True)
    check_sound(LossConfig(input_perturbation=0.1), ZERO_SNR)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_an_infinite_weight_is_refused_even_where_unsound_pairs_are_allowed(
    floor: float | None,
) -> None:
    loss = weight("min_snr", prediction_type="epsilon", floor=floor)
    with pytest.raises(UserError, match="loss.weighting=min_snr with loss.prediction_type=epsilon"):
        check_sound(loss, ZERO_SNR, allow_unsound=True)
    check_sound(LossConfig(prediction_type="epsilon"), ZERO_SNR, allow_unsound=True)


REFUSED = [
    {"loss.weighting": "min_snr", "loss.floor": 0.0},
    {"loss.offset_noise": 0.05},
]


@pytest.mark.parametrize("overrides", REFUSED, ids=["floor", "offset"])
def test_the_config_refuses_where_it_knows_and_the_run_where_the_base_decides(
    overrides: dict[str, Any],
) -> None:
    def config(**more: Any) -> Any:
        return tiny_config(Path("run"), Path("base"), Path("shards"), **overrides, **more)

    with pytest.raises(UserError, match="zero terminal SNR"):
        config()
    config(allow_unsound=True)
    unknown = config(**{"schedule.zero_terminal_snr": False})
    fine_tuned_process(unknown, Process(SD))
    with pytest.raises(UserError, match="zero terminal SNR"):
        fine_tuned_process(unknown, Process(ZERO_SNR))


def test_picture_and_table_of_the_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot_loss_weights, "DOCS", tmp_path)
    plot_loss_weights.main()
    assert (tmp_path / "loss_weights.png").stat().st_size > 10_000
    text = (tmp_path / "loss_weights.md").read_text()
    assert "| min_snr, gamma 5 | 0 | 16.3% | 0.2776 | 0.0925 |" in text
    assert text == Path("docs/loss_weights.md").read_text()
