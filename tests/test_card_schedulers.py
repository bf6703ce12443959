"""What the card says of diffusers' schedulers is so of the installed ones, and said where it is so.

Pictures are of one brightness each, c ~ N(0, 1), and the network is the ideal one for them: what a
scheduler makes of the schedule shows as the spread of brightness and as noise that is left.
"""

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch
from torch.testing import assert_close

from blackpoint.sampling.export import client_schedulers as card
from blackpoint.sampling.export.client_schedulers import DROP_ZERO_SNR, RIGHT_AT_ZERO_SNR
from blackpoint.sampling.grid import Prediction, SampleState
from blackpoint.sampling.prediction import to_eps
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import run
from tests.toy_denoisers import SD, ZERO_SNR

SIDE = 16
# What the card calls right, a twin of DDIM, and the two that it names as for distilled models.
HONOUR_ZERO_SNR = (*RIGHT_AT_ZERO_SNR, "DDIMParallelScheduler", "LCMScheduler", "TCDScheduler")
PROCESSES = {
    "published": Process(SD, "epsilon", "leading", set_alpha_to_one=False),
    "v": Process(SD, "v_prediction", "leading"),
    "v_trailing": Process(SD),
    "zero": Process(ZERO_SNR),
    "zero_sample": Process(ZERO_SNR, "sample"),
    "zero_linspace": Process(ZERO_SNR, timestep_spacing="linspace"),
    "zero_leading": Process(ZERO_SNR, timestep_spacing="leading"),
    "zero_epsilon": Process(ZERO_SNR, "epsilon"),
    "shifted": Process(SD.shifted(64, 128)),
    "zero_shifted": Process(ZERO_SNR.shifted(64, 128)),
}
ZERO = {name for name in PROCESSES if name.startswith("zero")}
UNSOUND = {"zero_leading", "zero_epsilon"}
TRAILING = set(PROCESSES) - {"published", "v", "zero_linspace", "zero_leading"}
SHOWN = {
    card.incompatibility_note: UNSOUND,
    card.keep_zero_snr: ZERO - UNSOUND,
    card.drop_zero_snr: ZERO,
    card.ddim_leaves_the_list: TRAILING | {"zero_linspace"},
    card.surplus_timestep: TRAILING,
    card.ancestral_ddim: ZERO - {"zero_leading"},
    card.final_alpha_bar: {"published"},
}


def ideal(process, x, t):
    """x0 and the network's output for pictures of one brightness."""
    level = max(int(t), 0)
    alpha, sigma = process.schedule.alpha[level].item(), process.schedule.sigma[level].item()
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x0 = (alpha * mean / (alpha**2 + (sigma / SIDE) ** 2)).expand_as(x)
    eps = (x - alpha * x0) / sigma
    outputs = {"v_prediction": alpha * eps - sigma * x0, "epsilon": eps, "sample": x0}
    return x0, outputs[process.prediction_type]


def scheduler_of(name, process, num_steps):
    scheduler = getattr(diffusers, name).from_config(process.to_diffusers())
    scheduler.set_timesteps(num_steps)
    return scheduler


def noise(num_images):
    return torch.randn(num_images, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def sample(name, process, num_steps, num_images=64, **options):
    """Pictures that an installed scheduler makes."""
    scheduler = scheduler_of(name, process, num_steps)
    x = noise(num_images) * scheduler.init_noise_sigma
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        output = ideal(process, scheduler.scale_model_input(x, t), t)[1]
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def spread(pictures):
    """Standard deviations of brightness over pictures (1 is right), and of what is not even."""
    means = pictures.mean(dim=(1, 2, 3), keepdim=True)
    return means.std().item(), (pictures - means).std().item()


def our_ddim(process, num_steps, num_images=64):
    def denoise(x, t):
        x0, output = ideal(process, x, t)
        alpha, sigma = process.schedule.alpha[t].item(), process.schedule.sigma[t].item()
        return Prediction(x0, to_eps(process.prediction_type, output, x, alpha, sigma))

    return run("ddim", denoise, process.grid(num_steps), SampleState(noise(num_images))).x


@pytest.mark.parametrize("fact", SHOWN, ids=lambda fact: fact.__name__)
def test_a_fact_is_said_where_it_is_so(fact):
    assert {name for name, process in PROCESSES.items() if fact(process)} == SHOWN[fact]
    assert set(card.scheduler_facts(PROCESSES["v"])) == {""}


@pytest.mark.parametrize("name", RIGHT_AT_ZERO_SNR)
@pytest.mark.parametrize("process", ["zero", "zero_sample", "zero_shifted"])
def test_schedulers_that_keep_the_flag_sample_right(name, process):
    if f"`{name}`" not in card.keep_zero_snr(PROCESSES[process]):
        assert process == "zero_sample"
        with pytest.raises(NotImplementedError, match="sample"):
            sample(name, PROCESSES[process], 50)
        return
    brightness, uneven = spread(sample(name, PROCESSES[process], 50))
    assert 0.85 < brightness < 1.15
    assert uneven < 1e-3


def test_every_scheduler_named_is_on_its_side():
    for name in HONOUR_ZERO_SNR:
        assert "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name)).parameters
    for name in DROP_ZERO_SNR:
        known = inspect.signature(getattr(diffusers, name)).parameters
        assert "rescale_betas_zero_snr" not in known
        assert name.removesuffix("Scheduler") in card.drop_zero_snr(PROCESSES["zero"])


@pytest.mark.parametrize("name", DROP_ZERO_SNR)
def test_schedulers_that_drop_the_flag_have_other_noise_levels(name):
    process = PROCESSES["zero"]
    assert "other noise levels" in card.drop_zero_snr(process)
    theirs = scheduler_of(name, process, 25).alphas_cumprod.double()
    assert_close(theirs, SD.alpha_bar, rtol=0, atol=1e-6)
    assert torch.isfinite(sample(name, process, 25)).all()


@pytest.mark.parametrize("name", DROP_ZERO_SNR)
def test_schedulers_that_drop_the_flag_are_nan_on_trained_betas(name):
    process = PROCESSES["zero_shifted"]
    assert "NaN with this model's `trained_betas`" in card.drop_zero_snr(process)
    try:
        assert not torch.isfinite(sample(name, process, 25)).all()
    except ValueError as error:
        assert "NaN" in str(error)


@pytest.mark.parametrize("process", ["zero", "zero_sample", "zero_linspace", "zero_shifted"])
def test_ancestral_ddim_is_nan_at_the_steps_that_are_named(process):
    process = PROCESSES[process]
    found = []
    for num_steps in range(1, 201):
        scheduler = scheduler_of("DDIMScheduler", process, num_steps)
        t, x = scheduler.timesteps[0], noise(1)
        x = scheduler.step(ideal(process, x, t)[1], t, x, eta=1.0).prev_sample
        if not torch.isfinite(x).all():
            found.append(num_steps)
    assert card.nan_steps(process) == found
    said = card.ancestral_ddim(process)
    assert card.listed(found) in said and f"({len(found)} of those up to 200)" in said


def test_ancestral_ddim_is_nan_at_its_first_step_alone():
    process = PROCESSES["zero"]
    steps = card.nan_steps(process)
    for num_steps in (*range(1, 51), 100, 111, 112, 200):
        pictures = sample("DDIMScheduler", process, num_steps, 2, eta=1.0)
        assert torch.isfinite(pictures).all() == (num_steps not in steps)
        assert torch.isfinite(sample("DDIMScheduler", process, num_steps, 2, eta=0.99)).all()
        assert torch.isfinite(sample("DDPMScheduler", process, num_steps, 2)).all()


@pytest.mark.parametrize("process", ["zero", "v_trailing", "zero_shifted"])
def test_ddim_leaves_a_trailing_list_where_steps_do_not_divide(process):
    process = PROCESSES[process]
    assert "(10, 20, 25, 40, 50, 100)" in card.ddim_leaves_the_list(process)
    for num_steps in (10, 20, 25, 40, 50, 100):
        assert_close(sample("DDIMScheduler", process, num_steps), our_ddim(process, num_steps))
    for num_steps in (7, 15, 30):
        apart = sample("DDIMScheduler", process, num_steps) - our_ddim(process, num_steps)
        assert apart.abs().max() > 1e-2
    assert spread(sample("DDIMScheduler", process, 7))[1] > 0.02  # noise that is left


def test_ddim_leaves_a_linspace_list():
    process = PROCESSES["zero_linspace"]
    for num_steps in (5, 10, 25, 50):
        apart = sample("DDIMScheduler", process, num_steps) - our_ddim(process, num_steps)
        assert apart.abs().max() > 1e-2


@pytest.mark.parametrize("process", ["zero", "zero_linspace"])
@pytest.mark.parametrize("name", RIGHT_AT_ZERO_SNR[1:])
def test_the_other_schedulers_follow_their_list(name, process):
    process, num_steps = PROCESSES[process], 7
    scheduler = scheduler_of(name, process, num_steps)
    steps = scheduler.timesteps.tolist()
    if name == "DDPMScheduler":
        following = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
        assert following == [*steps[1:], -1]
    else:
        assert len(steps) == num_steps and len(scheduler.sigmas) == num_steps + 1
        ratio = (process.schedule.sigma / process.schedule.alpha)[[round(t) for t in steps[1:]]]
        assert_close(scheduler.sigmas[1:-1].double(), ratio, rtol=2e-2, atol=0)
    assert spread(sample(name, process, num_steps))[1] < 1e-3


def test_the_surplus_timestep_is_where_it_is_said_to_be():
    process, found = PROCESSES["zero"], []
    for num_steps in range(1, 1001):
        steps = scheduler_of("DDIMScheduler", process, num_steps).timesteps
        if len(steps) != num_steps:
            assert steps[-1] == -1
            found.append(num_steps)
    assert card.surplus_steps(process, 1000) == found
    assert card.surplus_steps(process) == [61, 103, 121, 122]
    assert "not 61, 103, 121, 122 steps" in card.surplus_timestep(process)


@pytest.mark.parametrize("process", ["zero", "v_trailing", "zero_shifted"])
def test_the_surplus_timestep_loses_the_picture_in_ddim_and_ddpm(process):
    process = PROCESSES[process]
    for name in RIGHT_AT_ZERO_SNR:
        brightness = spread(sample(name, process, 61))[0]
        assert (brightness < 0.3) == (name in ("DDIMScheduler", "DDPMScheduler")), brightness


def test_only_ddim_ends_at_the_first_noise_level():
    process = PROCESSES["published"]
    assert "(sigma 0.029)" in card.final_alpha_bar(process)
    scheduler = scheduler_of("DDIMScheduler", process, 25)
    sigma = (1 - scheduler.final_alpha_cumprod).sqrt().item()
    assert sigma == pytest.approx(process.schedule.sigma[0].item(), rel=1e-3)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        assert scheduler_of(name, process, 25).sigmas[-1] == 0
    assert scheduler_of("UniPCMultistepScheduler", process, 25).sigmas[-1] == 0
    assert not card.final_alpha_bar(replace(process, set_alpha_to_one=True))


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([3, 4, 6], "3, 4, 6"), ([1, 2, 3, 9], "1-3, 9")]
)
def test_lists_are_short(numbers, text):
    assert card.listed(numbers) == text
