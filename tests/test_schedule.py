"""Laws of the noise schedules and of the timestep lists."""

from fractions import Fraction

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.schedule import NoiseSchedule, rescale_zero_terminal_snr

STOCK = {
    "scaled_linear": NoiseSchedule.scaled_linear,
    "linear": NoiseSchedule.linear,
    "squaredcos_cap_v2": NoiseSchedule.cosine_discrete,
}
RANGES = {
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_start": 0.0001, "beta_end": 0.02},
    "squaredcos_cap_v2": {},
}


def ours(name, rescaled):
    schedule = STOCK[name]()
    return schedule.zero_terminal_snr() if rescaled else schedule


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("rescaled", [False, True])
def test_alpha_and_sigma_lie_on_the_unit_circle(name, rescaled):
    schedule = ours(name, rescaled)
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    assert_close(
        schedule.alpha**2 + schedule.sigma**2,
        torch.ones(1000, dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )
    assert_close(schedule.snr, schedule.alpha**2 / schedule.sigma**2, rtol=1e-12, atol=0)
    assert_close(schedule.log_snr.exp(), schedule.snr, rtol=1e-12, atol=0)
    assert (schedule.alpha_bar.diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "terminal_alpha", "terminal_snr"),
    [
        ("linear", 0.006353, 4.035993e-05),
        ("squaredcos_cap_v2", 4.928220e-05, 2.428735e-09),
        ("scaled_linear", 0.068265, 0.004682),
    ],
)
def test_terminal_values_are_those_of_table_1(name, terminal_alpha, terminal_snr):
    """Lin et al. 2023, Table 1, to the digits printed there."""
    schedule = ours(name, rescaled=False)
    assert schedule.alpha[-1].item() == pytest.approx(terminal_alpha, rel=1e-4)
    assert schedule.snr[-1].item() == pytest.approx(terminal_snr, rel=2e-4)


@pytest.mark.parametrize("name", STOCK)
def test_rescale_ends_at_exactly_zero_keeps_the_first_and_is_idempotent(name):
    before, after = ours(name, False), ours(name, True)
    assert after.alpha[-1].item() == 0.0
    assert after.snr[-1].item() == 0.0
    assert after.is_zero_terminal_snr and not before.is_zero_terminal_snr
    assert_close(after.alpha[0], before.alpha[0], rtol=1e-14, atol=0)
    assert after.betas[-1].item() == 1.0
    again = NoiseSchedule.from_betas(rescale_zero_terminal_snr(after.betas))
    assert_close(again.alpha_bar, after.alpha_bar, rtol=0, atol=1e-14)
    assert_close(after.zero_terminal_snr().alpha_bar, after.alpha_bar, rtol=0, atol=0)
    # Algorithm 1 is affine in alpha: s' = (s - s_T) s_0 / (s_0 - s_T).
    s = before.alpha
    assert_close(after.alpha, (s - s[-1]) * s[0] / (s[0] - s[-1]), rtol=0, atol=1e-9)


def test_rescaled_stable_diffusion_has_the_known_noise_levels():
    """sigma / alpha just below the last step, as measured on the float64 schedule."""
    schedule = ours("scaled_linear", True)
    ratio = schedule.sigma[-4:-1] / schedule.alpha[-4:-1]
    expected = torch.tensor([748.00, 1124.55, 2254.24], dtype=torch.float64)
    assert_close(ratio, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("rescaled", [False, True])
def test_alpha_bar_equals_diffusers(name, rescaled):
    config = {"beta_schedule": name, **RANGES[name], "rescale_betas_zero_snr": rescaled}
    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    assert_close(ours(name, rescaled).alpha_bar, theirs, rtol=0, atol=1e-6)
    read = NoiseSchedule.from_diffusers({**config, "num_train_timesteps": 1000})
    assert_close(read.alpha_bar, ours(name, rescaled).alpha_bar, rtol=0, atol=0)


def test_trained_betas_are_read_and_win_over_the_named_scheme():
    betas = ours("scaled_linear", True).betas
    config = {"trained_betas": betas.tolist(), "beta_schedule": "linear"}
    read = NoiseSchedule.from_diffusers(config)
    assert_close(read.alpha_bar, ours("scaled_linear", True).alpha_bar, rtol=0, atol=1e-12)
    assert read.is_zero_terminal_snr


def test_betas_invert_from_betas():
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    assert_close(NoiseSchedule.from_betas(betas).betas, betas, rtol=1e-10, atol=1e-15)


def test_at_reads_float32_coefficients_by_timestep():
    schedule = ours("scaled_linear", True)
    alpha, sigma = schedule.at(torch.tensor([0, 999, 500]))
    assert alpha.dtype == sigma.dtype == torch.float32
    assert_close(alpha, schedule.alpha[[0, 999, 500]].float(), rtol=0, atol=0)
    assert alpha[1].item() == 0.0 and sigma[1].item() == 1.0


def test_stand_in_changes_the_last_step_alone():
    schedule = ours("scaled_linear", True)
    stand_in = schedule.with_terminal_alpha_bar(2**-24)
    assert stand_in.alpha[-1].item() == 2**-12
    assert_close(stand_in.alpha_bar[:-1], schedule.alpha_bar[:-1], rtol=0, atol=0)
    assert schedule.alpha[-1].item() == 0.0


def test_trailing_list_is_right_for_every_number_of_steps():
    """t_i = round(T - i T / S) - 1 exactly; halves round to even, as numpy's round does.

    In integers: with T (S - i) = q S + r, round up when 2 r > S, or when 2 r = S and q is odd.
    """
    schedule = ours("scaled_linear", True)
    for num_steps in range(1, 1001):
        exact = []
        for i in range(num_steps):
            quotient, rest = divmod(1000 * (num_steps - i), num_steps)
            exact.append(quotient + (2 * rest + quotient % 2 > num_steps) - 1)
        steps = schedule.trailing_timesteps(num_steps)
        assert steps == exact, num_steps
        assert len(set(steps)) == num_steps
        assert steps[0] == 999 and steps[-1] >= 0
        assert all(earlier > later for earlier, later in zip(steps, steps[1:], strict=False))


def test_trailing_list_has_no_spurious_entry_where_floating_point_adds_one():
    """np.arange(T, 0, -T / S), as in diffusers, yields a timestep -1 for S = 61, 103, 121, ...

    Elsewhere the lists agree but for exact halves, which floating point rounds either way.
    """
    schedule = ours("scaled_linear", False)
    faulty = 0
    for num_steps in range(1, 1001):
        floating = numpy.round(numpy.arange(1000, 0, -1000 / num_steps)).astype(int) - 1
        if len(floating) != num_steps:
            assert floating[-1] == -1
            faulty += 1
        steps = schedule.trailing_timesteps(num_steps)
        for i, (exact, floated) in enumerate(zip(steps, floating.tolist(), strict=False)):
            if exact != floated:
                assert abs(exact - floated) == 1
                assert Fraction(i * 1000, num_steps).denominator == 2, (num_steps, i)
    assert faulty == 62


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.data())
def test_trailing_list_is_right_for_any_number_of_training_steps(total, draw):
    schedule = NoiseSchedule.linear(num_steps=total)
    num_steps = draw.draw(st.integers(1, total))
    steps = schedule.trailing_timesteps(num_steps)
    assert len(set(steps)) == num_steps and steps[0] == total - 1 and steps[-1] >= 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 25, 50, 100, 300, 999])
def test_timestep_lists_equal_diffusers(spacing, num_steps):
    scheduler = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    steps = NoiseSchedule.linear().timesteps(num_steps, spacing, steps_offset=1)
    assert steps == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_timestep_lists_are_distinct_and_in_range(spacing):
    schedule = NoiseSchedule.linear()
    for num_steps in (*range(1, 1000, 14), 999, 1000):
        steps = schedule.timesteps(num_steps, spacing, steps_offset=1)
        assert len(set(steps)) == num_steps, num_steps
        assert min(steps) >= 0 and max(steps) <= 999


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_number_of_steps_out_of_range_is_refused(num_steps, spacing):
    with pytest.raises(UserError, match=rf"num_steps={num_steps}\b.*1000"):
        NoiseSchedule.linear().timesteps(num_steps, spacing)


def test_unknown_beta_schedule_is_refused():
    with pytest.raises(UserError, match="beta_schedule='sigmoid'"):
        NoiseSchedule.from_diffusers({"beta_schedule": "sigmoid"})


@pytest.mark.parametrize(
    "betas", [[0.1, 0.0], [0.1, -0.2], [0.1, 1.5], [1.0, 0.1], [0.1, float("nan")], [0.1]]
)
def test_betas_that_make_no_schedule_are_refused(betas):
    with pytest.raises(UserError):
        NoiseSchedule.from_betas(torch.tensor(betas, dtype=torch.float64))
