"""Laws of the resolution shift and of the bounded cosine, and of how stock diffusers reads them."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.config.schedule_config import ScheduleConfig, ShiftConfig
from blackpoint.train.target_process import fine_tuned_process
from tests.test_train_config import config

SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
RATIOS = [(64, 96), (64, 128), (96, 64), (512, 768), (64, 1024), (32, 33)]


@pytest.mark.parametrize(("base", "resolution"), RATIOS)
@pytest.mark.parametrize("schedule", [SD, ZERO_SNR], ids=["sd", "zero_snr"])
def test_the_shift_multiplies_the_snr_and_keeps_zero(
    schedule: NoiseSchedule, base: int, resolution: int
) -> None:
    shifted = schedule.shifted(base, resolution)
    assert_close(shifted.snr, schedule.snr * (base / resolution) ** 2, rtol=1e-9, atol=0)
    assert shifted.is_zero_terminal_snr == schedule.is_zero_terminal_snr
    finite = schedule.log_snr.isfinite()
    assert_close(
        shifted.log_snr[finite],
        schedule.log_snr[finite] + 2 * math.log(base / resolution),
        rtol=0,
        atol=1e-9,
    )


def test_shifts_add_up_and_undo_each_other() -> None:
    there = ZERO_SNR.shifted(64, 128)
    assert_close(there.shifted(128, 64).alpha_bar, ZERO_SNR.alpha_bar, rtol=1e-12, atol=1e-15)
    twice = ZERO_SNR.shifted(64, 96).shifted(96, 128)
    assert_close(twice.alpha_bar, there.alpha_bar, rtol=1e-12, atol=1e-15)
    assert ZERO_SNR.alpha_bar[0].item() == pytest.approx(0.99915, abs=5e-6)
    assert there.alpha_bar[0].item() == pytest.approx(0.99661, abs=5e-6)


def test_an_interpolated_shift_is_one_base_at_each_end_and_between_them_inside() -> None:
    cosine = NoiseSchedule.cosine_continuous(-15, 15)
    from_256, from_32 = cosine.shifted(256, 512), cosine.shifted(32, 512)
    both = cosine.shifted(base_resolution=32, resolution=512, base_at_start=256)
    assert_close(both.log_snr[0], from_256.log_snr[0])
    assert_close(both.log_snr[-1], from_32.log_snr[-1])
    u = torch.linspace(0, 1, 1000, dtype=torch.float64)
    expected = u * from_32.log_snr + (1 - u) * from_256.log_snr  # the paper's low and high
    assert_close(both.log_snr, expected, rtol=0, atol=1e-9)
    assert (both.log_snr[1:] < from_256.log_snr[1:]).all()  # noisier, and most so at the end


def test_the_bounded_cosine_is_the_papers_between_its_bounds() -> None:
    schedule = NoiseSchedule.cosine_continuous(-15, 15)
    assert_close(schedule.log_snr[[0, -1]], torch.tensor([15.0, -15.0]).double(), rtol=1e-9, atol=0)
    angle = torch.linspace(math.atan(math.exp(-7.5)), math.atan(math.exp(7.5)), 1000).double()
    assert_close(schedule.log_snr, -2 * angle.tan().log(), rtol=1e-4, atol=1e-4)
    assert schedule.log_snr[499].item() == pytest.approx(-schedule.log_snr[500].item(), abs=1e-9)
    for low, high in ((15, -15), (-math.inf, 15), (-15, math.nan)):
        with pytest.raises(UserError, match="needs two finite ones, the lower first"):
            NoiseSchedule.cosine_continuous(low, high)


@pytest.mark.parametrize(("base", "resolution"), RATIOS)
@pytest.mark.parametrize("zero_snr", [True, False])
def test_stock_diffusers_loads_the_export_with_the_same_alpha_bar(
    base: int, resolution: int, zero_snr: bool
) -> None:
    overrides: dict[str, Any] = {
        "schedule.zero_terminal_snr": zero_snr,
        "schedule.shift.base_resolution": base,
        "schedule.shift.resolution": resolution,
    }
    process = fine_tuned_process(config(**overrides), Process(SD, "epsilon", "leading"))
    written = process.to_diffusers()
    assert written["trained_betas"] is not None
    loaded = DDIMScheduler.from_config(written).alphas_cumprod.double()
    exact = process.schedule.alpha_bar
    assert_close(loaded[:-1], exact[:-1], rtol=1e-5, atol=0)
    assert loaded[-1].item() == pytest.approx(exact[-1].item(), abs=1e-7)
    again = Process.from_diffusers(written)
    assert_close(again.schedule.alpha_bar, exact, rtol=1e-9, atol=1e-15)


def test_auto_takes_the_resolution_of_the_data() -> None:
    overrides = {"schedule.shift.base_resolution": 512, "data.resolution": 768}
    process = fine_tuned_process(config(**overrides), Process(SD, "epsilon", "leading"))
    expected = ZERO_SNR.shifted(512, 768).alpha_bar
    assert_close(process.schedule.alpha_bar, expected, rtol=1e-12, atol=0)


def test_a_continuous_cosine_is_trained_and_travels() -> None:
    overrides = {
        "schedule.betas": "cosine_continuous",
        "schedule.log_snr_min": -15.0,
        "schedule.log_snr_max": 15.0,
        "schedule.zero_terminal_snr": False,
    }
    process = fine_tuned_process(config(**overrides), Process(SD, "epsilon", "leading"))
    again = Process.from_diffusers(process.to_diffusers())
    assert again.schedule.log_snr[-1].item() == pytest.approx(-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig(betas="cosine_continuous"), "needs schedule.log_snr_min"),
        (lambda: ScheduleConfig(log_snr_min=-15.0), "bounds of schedule.betas=cosine_continuous"),
        (lambda: ShiftConfig(resolution=96), "base_resolution is not set"),
        (lambda: ShiftConfig(64, "same"), "resolution=same: is neither a number nor auto"),
        (lambda: ShiftConfig(0), "schedule.shift.base_resolution=0 is out of range"),
        (lambda: SD.shifted(64, 0), "must be positive"),
        (lambda: SD.shifted(10**6, 64, 1), "does not fall at every step"),
        (
            lambda: Process(ZERO_SNR.shifted(2**20, 64)).check_exportable(),
            "can't be exported: diffusers multiplies betas in float32",
        ),
    ],
)
def test_what_cannot_be_shifted_or_exported_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
