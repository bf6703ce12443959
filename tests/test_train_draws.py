"""Laws of the random draws that the training loss is averaged over."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blackpoint.sampling.noise import derive_seed
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.callbacks.snr_bins import snr_bins
from blackpoint.train.draws import PHI, Draws, draw, draw_validation, stratified_timesteps
from blackpoint.train.loss_config import LossConfig

SHAPE = (4, 8, 8)
NAMES = ("posterior_noise", "t", "eps")
ALL_OPTIONS = LossConfig(
    timesteps="stratified", terminal_share=0.3, offset_noise=0.1, input_perturbation=0.1
)


def draw_many(num_samples: int, loss: LossConfig | None = None, seed: int = 3) -> Draws:
    numbers = list(range(num_samples))
    return draw(seed, [0] * num_samples, numbers, (1, 2, 2), 1000, numbers, loss)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    places=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**7)), min_size=1, max_size=6),
    loss=st.sampled_from([None, ALL_OPTIONS]),
    posterior=st.booleans(),
)
def test_draws_depend_on_seed_epoch_index_and_position_only(
    seed: int, places: list[tuple[int, int]], loss: LossConfig | None, posterior: bool
) -> None:
    epochs, indices = [epoch for epoch, _ in places], [index for _, index in places]
    positions = [10**7 * epoch + index for epoch, index in places]
    batch = draw(seed, epochs, indices, SHAPE, 1000, positions, loss, posterior)
    for row, (epoch, index) in enumerate(places):
        alone = draw(seed, [epoch], [index], SHAPE, 1000, [positions[row]], loss, posterior)
        for name in NAMES[not posterior :] + (("perturbation",) if loss else ()):
            assert_close(getattr(batch, name)[row], getattr(alone, name)[0], rtol=0, atol=0)


def test_draws_by_default_are_posterior_noise_then_t_then_eps() -> None:
    batch = draw(5, [2], [7], SHAPE, 1000)
    generator = torch.Generator("cpu").manual_seed(derive_seed(5, "train", 2, 7))
    expected = Draws(
        torch.randn(SHAPE, generator=generator)[None],
        torch.randint(0, 1000, (), generator=generator)[None],
        torch.randn(SHAPE, generator=generator)[None],
    )
    for name in NAMES:
        assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=0)
    assert batch.perturbed(batch.eps) is batch.eps


def test_without_a_posterior_t_comes_first_and_nothing_is_drawn_for_it() -> None:
    batch = draw(5, [2, 2], [7, 8], SHAPE, 1000, posterior=False)
    assert batch.posterior_noise is None
    for row, index in enumerate((7, 8)):
        generator = torch.Generator("cpu").manual_seed(derive_seed(5, "train", 2, index))
        assert batch.t[row] == torch.randint(0, 1000, (), generator=generator)
        assert torch.equal(batch.eps[row], torch.randn(SHAPE, generator=generator))
    ranges = [(10, 20), (990, 1000)]
    held_out = draw_validation(5, [7, 8], ranges, SHAPE, posterior=False)
    assert held_out.posterior_noise is None
    generator = torch.Generator("cpu").manual_seed(derive_seed(5, "validation", 8))
    assert held_out.t[1] == torch.randint(990, 1000, (), generator=generator)


def test_draws_of_another_seed_epoch_or_index_differ() -> None:
    draws = [draw(*place, SHAPE, 1000) for place in ((0, [0], [0]), (1, [0], [0]))]
    draws += [draw(0, [1], [0], SHAPE, 1000), draw(0, [0], [1], SHAPE, 1000)]
    assert len({float(each.eps.sum()) for each in draws}) == 4
    assert not torch.equal(draws[0].eps, draws[0].posterior_noise)


def test_draws_have_the_right_distribution() -> None:
    num_samples = 2000
    draws = draw_many(num_samples)
    assert draws.t.min() < 10 and 990 <= draws.t.max() <= 999
    # Five standard errors: 1000 / sqrt(12 n) for t, 1 / sqrt(4 n) for eps.
    assert abs(draws.t.float().mean() - 499.5) < 5 * 1000 / (12 * num_samples) ** 0.5
    assert abs(draws.eps.mean()) < 5 / (4 * num_samples) ** 0.5
    assert abs(draws.eps.std() - 1) < 5 / (8 * num_samples) ** 0.5


@pytest.mark.parametrize(
    ("loss", "changed"),
    [
        (LossConfig(timesteps="stratified"), {"t"}),
        (LossConfig(terminal_share=0.5), {"t"}),
        (LossConfig(offset_noise=0.1), {"eps"}),
        (LossConfig(input_perturbation=0.1), {"perturbation"}),
        (LossConfig(weighting="min_snr", uncertainty=True), set()),
    ],
)
def test_an_option_changes_its_own_draw_and_no_other(loss: LossConfig, changed: set[str]) -> None:
    plain, other = draw_many(16), draw_many(16, loss)
    for name in NAMES:
        assert torch.equal(getattr(plain, name), getattr(other, name)) == (name not in changed)
    assert (other.perturbation is None) == ("perturbation" not in changed)


def test_terminal_share_trains_the_last_timestep_and_leaves_the_others() -> None:
    plain, more = draw_many(2000), draw_many(2000, LossConfig(terminal_share=0.2))
    moved = more.t != plain.t
    assert (more.t[moved] == 999).all()
    share = (more.t == 999).double().mean()
    assert abs(share - (0.2 + 0.8 / 1000)) < 5 * (0.2 * 0.8 / 2000) ** 0.5


def test_offset_noise_shifts_each_channel_of_each_sample_as_a_whole() -> None:
    numbers = list(range(500))
    plain = draw(0, numbers, numbers, (4, 3, 3), 1000)
    offset = draw(0, numbers, numbers, (4, 3, 3), 1000, loss=LossConfig(offset_noise=0.5))
    shift = offset.eps - plain.eps
    # Below 8 a sum is rounded by 2.4e-7 at most, and two of them are compared.
    assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=2e-6)
    assert abs(shift[:, :, 0, 0].std() - 0.5) < 5 * 0.5 / (2 * 2000) ** 0.5


def test_perturbation_reaches_the_input_and_not_the_target() -> None:
    draws = draw_many(2000, LossConfig(input_perturbation=0.1))
    plain = draw_many(2000)
    assert_close(draws.eps, plain.eps, rtol=0, atol=0)
    added = draws.perturbed(draws.eps) - draws.eps
    assert abs(added.std() - 0.1) < 5 * 0.1 / (2 * 8000) ** 0.5
    assert abs((added * draws.eps).mean()) < 5 * 0.1 / 8000**0.5


def test_phi_is_the_golden_ratio_to_the_last_bit() -> None:
    """The root of x^2 + x = 1 between 0 and 1, rounded down."""
    one = 1 << 128
    assert PHI * PHI + PHI * one <= one * one < (PHI + 1) ** 2 + (PHI + 1) * one


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    first=st.integers(0, 10**12),
    batch_size=st.integers(1, 512),
    num_timesteps=st.sampled_from([1000, 999, 7]),
)
def test_stratified_timesteps_spread_evenly_wherever_a_batch_begins(
    seed: int, first: int, batch_size: int, num_timesteps: int
) -> None:
    t = stratified_timesteps(seed, range(first, first + batch_size), num_timesteps)
    assert all(0 <= each < num_timesteps for each in t)
    for num_parts in (2, 4, 16):  # star discrepancy of the golden ratio is below 1 + log n
        edge = num_timesteps / num_parts
        for part in range(1, num_parts):
            bound = round(part * edge)
            expected = batch_size * bound / num_timesteps
            assert (
                abs(sum(each < bound for each in t) - expected)
                < 1 + torch.tensor(float(batch_size)).log()
            )
    gaps = [b - a for a, b in zip(sorted(t), sorted(t)[1:], strict=False)]
    assert max(gaps, default=0) <= 2 * num_timesteps / batch_size + 1


def test_stratified_timesteps_are_uniform_in_the_long_run() -> None:
    t = torch.tensor(stratified_timesteps(0, range(10**9, 10**9 + 50_000), 1000))
    counts = t.bincount(minlength=1000)
    assert len(counts) == 1000 and counts.min() >= 48 and counts.max() <= 52


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=10), seed=st.integers(0, 2**31))
def test_stratified_timesteps_are_the_same_however_batches_are_cut(
    cuts: list[int], seed: int
) -> None:
    whole = stratified_timesteps(seed, range(sum(cuts)), 1000)
    parts, first = [], 0
    for size in cuts:
        parts += stratified_timesteps(seed, range(first, first + size), 1000)
        first += size
    assert parts == whole
    assert stratified_timesteps(seed, range(0, sum(cuts), 2), 1000) == whole[::2]  # two processes


def test_stratified_timesteps_of_two_seeds_differ() -> None:
    assert stratified_timesteps(0, range(9), 1000) != stratified_timesteps(1, range(9), 1000)


def test_validation_draws_stay_in_their_range() -> None:
    ranges = list(snr_bins(NoiseSchedule.scaled_linear().zero_terminal_snr()).values())
    draws = draw_validation(0, list(range(len(ranges))), ranges, SHAPE)
    assert all(low <= t < high for t, (low, high) in zip(draws.t.tolist(), ranges, strict=True))
