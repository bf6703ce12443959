"""DDIM ends where diffusers' DDIM ends: at clean data, or at the schedule's first alpha_bar."""

import json
import logging

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from torch.testing import assert_close

from blackpoint.sampling.export.export import export
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import run
from tests.tiny_pipeline import SD15_SCHEDULER_CONFIG, make_tiny_pipeline
from tests.toy_denoisers import noise_of, reader, toy_network

CLASSES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
OF_SAMPLERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def config(set_alpha_to_one, **entries):
    return SD15_SCHEDULER_CONFIG | {"set_alpha_to_one": set_alpha_to_one} | entries


@pytest.fixture(scope="module", params=[False, True])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "sd"
    return make_tiny_pipeline(folder, scheduler={"set_alpha_to_one": request.param})


@pytest.mark.parametrize("value", [False, True, None])
@pytest.mark.parametrize("name", CLASSES)
def test_ddim_of_any_scheduler_class_ends_where_its_config_says(name, value):
    """Absent it is what the class says, false for PNDM; true for classes without the key."""
    written = {k: v for k, v in config(value).items() if v is not None} | {"_class_name": name}
    own = getattr(diffusers, name)().config.get("set_alpha_to_one", True)
    theirs = DDIMScheduler.from_config({**config(own), **written, "_class_name": "DDIMScheduler"})
    ours = Process.from_diffusers(written).final_alpha_bar("ddim")
    assert ours == pytest.approx(theirs.final_alpha_cumprod.item(), abs=1e-6)
    assert (ours == 1) == (value or (value is None and name != "PNDMScheduler"))


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("sampler", OF_SAMPLERS)
def test_other_samplers_end_at_clean_data_as_diffusers_do(sampler, set_alpha_to_one):
    process = Process.from_diffusers(config(set_alpha_to_one))
    theirs = getattr(diffusers, OF_SAMPLERS[sampler]).from_config(process.to_diffusers())
    theirs.set_timesteps(5)
    assert theirs.sigmas[-1] == 0
    assert process.grid(5, sampler).level(5) == (1, 0)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 5, 25])
def test_ddim_equals_diffusers(num_steps, spacing, set_alpha_to_one, eta):
    written = config(set_alpha_to_one, timestep_spacing=spacing, prediction_type="v_prediction")
    process, scheduler = Process.from_diffusers(written), DDIMScheduler.from_config(written)
    scheduler.set_timesteps(num_steps)
    fresh = [noise_of().flip(step % 4) for step in range(num_steps)]
    theirs = noise_of()
    for step, t in enumerate(scheduler.timesteps):
        output = toy_network(theirs, t.item())
        extra = {"eta": eta, "variance_noise": fresh[step]} if eta else {}
        theirs = scheduler.step(output, t, theirs, **extra).prev_sample
    ours = run(
        "ddim",
        reader(process.schedule),
        process.grid(num_steps),
        SampleState(noise_of()),
        eta=eta,
        noise=lambda step: fresh[step],
    )
    assert_close(ours.x, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_naive_inversion_equals_diffusers(set_alpha_to_one):
    """Of a network that predicts eps: theirs converts v at the clean end, ours at the noisy one."""
    written = config(set_alpha_to_one)
    process, scheduler = Process.from_diffusers(written), DDIMInverseScheduler.from_config(written)
    scheduler.set_timesteps(10)
    theirs = clean = 0.3 * noise_of()
    for t in scheduler.timesteps:
        theirs = scheduler.step(toy_network(theirs, t.item()), t, theirs).prev_sample
    denoise = reader(process.schedule, "epsilon")
    ours = invert(denoise, process.grid(10), clean, Inverter("ddim").of(process)).x
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_pictures_of_a_published_base_equal_diffusers(checkpoint):
    """SD 1.5's published scheduler is PNDM with set_alpha_to_one false; DDIM is made from it."""
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    options = {"guidance_scale": 3.0, "guidance_rescale": 0.7}
    theirs = pipeline(
        "a photo",
        num_inference_steps=10,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="pt",
        **options,
    ).images
    ours = DiffusionModel.load(checkpoint).sample(["a photo"], [1], num_steps=10, **options)
    assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_saving_and_exporting_keep_it(checkpoint, tmp_path):
    model = DiffusionModel.load(checkpoint)
    export(checkpoint, tmp_path / "out")
    model.save(tmp_path / "saved")
    for folder in (tmp_path / "out", tmp_path / "saved"):
        written = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        assert written["set_alpha_to_one"] == model.process.set_alpha_to_one
        assert DiffusionModel.load(folder).process.set_alpha_to_one == written["set_alpha_to_one"]


def test_another_last_sigma_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        euler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
        Process.from_diffusers({**euler, "final_sigmas_type": "zero"})
        assert not caplog.records
        Process.from_diffusers({**euler, "final_sigmas_type": "sigma_min"})
    assert "final_sigmas_type=sigma_min" in caplog.text and "is not kept" in caplog.text
