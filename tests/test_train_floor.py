"""Laws of the floor of loss weights: it lifts the noisy end alone, under every shift."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.loss_config import LossConfig
from blackpoint.train.module import FineTuner
from blackpoint.train.records.continuing import as_started, check_continues
from blackpoint.train.records.run_directory import RunRecord
from blackpoint.train.weighting import (
    check_sound,
    floor_of,
    floored_v_weights,
    loss_weights,
    v_weights,
)
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import (
    Killed,
    assert_same_run,
    kill,
    make_tiny_shards,
    stop_in_step,
    tiny_config,
)

SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
# Of the shift from 64: the largest share of timesteps that a floor may lift, which grows with the
# share of the schedule that is noise. A floor of 0.1 everywhere lifts .48, .60, .77 and .90 of p2.
LARGEST_SHARE = {64: 0.40, 128: 0.50, 256: 0.60, 512: 0.66}
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "min_snr": {"weighting": "min_snr"},
    "soft_min_snr": {"weighting": "soft_min_snr"},
    "p2": {"weighting": "p2"},
    "p2, plain eps loss": {"weighting": "p2", "p2_gamma": 0.0},
    "sigmoid": {"weighting": "sigmoid"},
    "sigmoid, bias -2": {"weighting": "sigmoid", "sigmoid_bias": -2.0},
}


def is_one_stretch_at_the_end(lifted: torch.Tensor) -> bool:
    return bool((lifted.int().diff() >= 0).all())


@pytest.mark.parametrize("output", ["v_prediction", "sample"])
@pytest.mark.parametrize("resolution", LARGEST_SHARE)
@pytest.mark.parametrize("options", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_the_floor_rescues_the_noisy_end_and_leaves_the_rest(
    options: dict[str, Any], resolution: int, output: Any
) -> None:
    schedule = ZERO_SNR.shifted(64, resolution)
    loss = LossConfig(prediction_type=output, **options)
    check_sound(loss, schedule)
    published, used = v_weights(loss, schedule), floored_v_weights(loss, schedule)
    lifted = used != published
    assert (schedule.snr[lifted] < 1).all() and is_one_stretch_at_the_end(lifted)
    assert lifted.double().mean().item() <= LARGEST_SHARE[resolution]
    assert_close(used[-1], published.mean() / 3, rtol=1e-12, atol=0)
    assert (used[lifted] == used[-1]).all()
    # Far from uniform: by the mean, the largest weight is at least thrice the least of the end.
    assert 3 <= (used.max() / used[-1]).item() <= 70
    own = loss_weights(loss, schedule)
    assert torch.isfinite(own).all() and (own > 0).all()
    per_v = 1 - schedule.alpha_bar if output == "sample" else torch.ones(1000).double()
    assert_close(own, used / per_v, rtol=1e-12, atol=0)
    assert (own[lifted] <= 2 * used[-1]).all()  # sigma^2 > 1/2 where SNR < 1


@pytest.mark.parametrize("resolution", LARGEST_SHARE)
def test_min_snr_of_x0_is_at_most_its_gamma(resolution: int) -> None:
    """Hang et al. 2023: min(SNR, 5). A floor of 0.1 at every t made it 117.6 at t = 0."""
    loss = LossConfig(weighting="min_snr", prediction_type="sample")
    weights = loss_weights(loss, ZERO_SNR.shifted(64, resolution))
    assert weights.max().item() == pytest.approx(5, rel=1e-12)
    assert weights[0].item() == pytest.approx(5, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    weighting=st.sampled_from(["min_snr", "soft_min_snr", "p2", "sigmoid"]),
    snr_gamma=st.floats(0.01, 100),
    p2_k=st.floats(0.01, 10),
    p2_gamma=st.floats(0, 3),
    sigmoid_bias=st.floats(-20, 20),
    resolution=st.sampled_from([16, 64, 256, 4096]),
)
def test_whatever_the_parameters_nothing_jumps_at_snr_1(resolution: int, **options: Any) -> None:
    schedule = ZERO_SNR.shifted(64, resolution)
    loss = LossConfig(**options)
    published, used = v_weights(loss, schedule), floored_v_weights(loss, schedule)
    assert torch.isfinite(used).all() and used[-1] > 0
    assert used[-1] <= published.mean() / 3 * (1 + 1e-12)
    lifted = used != published
    assert is_one_stretch_at_the_end(lifted) and (schedule.snr[lifted] < 1).all()
    from_snr_1_up = int((schedule.snr >= 1).sum())
    if from_snr_1_up:
        assert floor_of(loss, schedule) <= published[from_snr_1_up - 1]


@pytest.mark.parametrize("output", ["v_prediction", "epsilon", "sample"])
def test_a_number_is_the_least_weight_of_a_v_error_where_snr_is_below_1(output: Any) -> None:
    """Without zero terminal SNR, where eps is sound too: alpha^2 is at least .0047."""
    loss = LossConfig(weighting="p2", floor=0.3, prediction_type=output)
    own = loss_weights(loss, SD)
    per_v = {"epsilon": SD.alpha_bar, "sample": 1 - SD.alpha_bar}.get(output, 1.0)
    noisy = SD.snr < 1
    published = v_weights(loss, SD)
    assert_close((own * per_v)[~noisy], published[~noisy], rtol=1e-12, atol=0)
    # p2 is at most .25, so all of the noisy end is at the number: a step of .05 at SNR 1
    assert_close((own * per_v)[noisy], torch.full_like(own, 0.3)[noisy], rtol=1e-12, atol=0)
    unset = loss_weights(LossConfig(weighting="p2", prediction_type=output), SD)
    assert_close(unset * per_v, published, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("floor", "on_zero_snr", "on_sd"), [(None, 0.1, 0.0), (0.3, 0.3, 0.3)])
def test_everywhere_is_the_rule_of_runs_that_are_older_than_the_key(
    floor: float | None, on_zero_snr: float, on_sd: float
) -> None:
    loss = LossConfig(weighting="min_snr", floor=floor, floor_where="everywhere")
    for schedule, least in ((ZERO_SNR, on_zero_snr), (SD, on_sd)):
        expected = v_weights(loss, schedule).clamp(min=least)
        assert torch.equal(loss_weights(loss, schedule), expected)


def make_old(run_dir: Path) -> None:
    saved = OmegaConf.load(run_dir / "config.yaml")
    del saved.loss["floor_where"]
    OmegaConf.save(saved, run_dir / "config.yaml")


def test_a_run_that_is_older_than_the_key_goes_on_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal to the bit to an unbroken run whose floor is max(w, 0.1) at every timestep."""
    pipeline, shards = make_tiny_pipeline(tmp_path / "base"), make_tiny_shards(tmp_path / "data")
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    options = {"loss.weighting": "min_snr", "trainer.checkpoint_every_steps": 2}
    options |= {"trainer.max_steps": 4}
    old, unbroken, new = (tmp_path / name for name in ("old", "unbroken", "new"))
    for run_dir in (old, unbroken):
        config = tiny_config(
            run_dir, pipeline, shards, **options, **{"loss.floor_where": "everywhere"}
        )
        with monkeypatch.context() as patch:
            if run_dir == old:
                stop_in_step(patch, 2, kill, FineTuner)
                with pytest.raises(Killed):
                    blackpoint.train.run.fit(config)
            else:
                assert blackpoint.train.run.fit(config) == 0
    make_old(old)
    capsys.readouterr()
    assert blackpoint.train.run.fit(tiny_config(old, pipeline, shards, **options)) == 0
    assert "goes on with the same weights (loss.floor_where=everywhere)" in capsys.readouterr().err
    assert_same_run(old, unbroken, step=4)
    assert blackpoint.train.run.fit(tiny_config(new, pipeline, shards, **options)) == 0
    assert "floor_where" not in capsys.readouterr().err
    with pytest.raises(AssertionError):  # the rule of new runs trains other weights
        assert_same_run(new, unbroken, step=4)


def test_the_rule_of_an_older_run_is_named_only_where_it_matters(tmp_path: Path) -> None:
    def written(**options: Any) -> Any:
        config = tiny_config(tmp_path, Path("base"), Path("shards"), **options)
        OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
        return config

    weighted = {"loss.weighting": "p2"}
    config = written(**weighted)
    assert as_started(RunRecord.read(tmp_path), config) == (config, [])  # of this version
    make_old(tmp_path)
    started, notes = as_started(RunRecord.read(tmp_path), config)
    assert started.loss.floor_where == "everywhere" and len(notes) == 1
    check_continues(tmp_path, config)
    check_continues(tmp_path, started)  # said by the user himself
    assert as_started(RunRecord.read(tmp_path), started) == (started, [])

    config = written()
    make_old(tmp_path)
    assert as_started(RunRecord.read(tmp_path), config) == (config, [])  # uniform has no floor

    of_x0 = {"loss.prediction_type": "sample", "data.validation_shards": "held_out"}
    config = written(**of_x0)
    make_old(tmp_path)
    started, notes = as_started(RunRecord.read(tmp_path), config)
    assert started == config and len(notes) == 1
    assert "goes on as validation/sample_loss" in notes[0]
    assert math.isclose(floor_of(started.loss, SD), 0)
