"""Laws of the training loss and of the draws that it is averaged over."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sampling.prediction import add_noise, training_target, v_to_x0
from sampling.schedule import NoiseSchedule
from train.draws import draw, draw_validation
from train.loss import squared_error, uniform_weights
from train.validation import snr_bins

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


def test_the_last_step_carries_full_weight() -> None:
    weights = uniform_weights(1000)
    assert weights[-1] == 1
    assert_close(weights.mean(), torch.tensor(1.0))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    places=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**7)), min_size=1, max_size=6),
)
def test_draws_depend_on_seed_epoch_and_index_only(
    seed: int, places: list[tuple[int, int]]
) -> None:
    epochs, indices = [epoch for epoch, _ in places], [index for _, index in places]
    batch = draw(seed, epochs, indices, SHAPE, 1000)
    for row, (epoch, index) in enumerate(places):
        alone = draw(seed, [epoch], [index], SHAPE, 1000)
        for name in ("posterior_noise", "t", "eps"):
            assert_close(getattr(batch, name)[row], getattr(alone, name)[0], rtol=0, atol=0)


def test_draws_of_another_seed_epoch_or_index_differ() -> None:
    draws = [draw(*place, SHAPE, 1000) for place in ((0, [0], [0]), (1, [0], [0]))]
    draws += [draw(0, [1], [0], SHAPE, 1000), draw(0, [0], [1], SHAPE, 1000)]
    assert len({float(each.eps.sum()) for each in draws}) == 4
    assert not torch.equal(draws[0].eps, draws[0].posterior_noise)


def test_draws_have_the_right_distribution() -> None:
    num_samples = 4000
    draws = draw(3, [0] * num_samples, list(range(num_samples)), (1, 2, 2), 1000)
    assert draws.t.min() < 5 and draws.t.max() == 999
    # Five standard errors: 1000 / sqrt(12 n) for t, 1 / sqrt(4 n) for eps.
    assert abs(draws.t.float().mean() - 499.5) < 5 * 1000 / (12 * num_samples) ** 0.5
    assert abs(draws.eps.mean()) < 5 / (4 * num_samples) ** 0.5
    assert abs(draws.eps.std() - 1) < 5 / (8 * num_samples) ** 0.5


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


def test_validation_draws_stay_in_their_range() -> None:
    ranges = list(snr_bins(ZERO_SNR).values())
    draws = draw_validation(0, list(range(len(ranges))), ranges, SHAPE)
    assert all(low <= t < high for t, (low, high) in zip(draws.t.tolist(), ranges, strict=True))
