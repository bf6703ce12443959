"""A scheduler_config.json means here what it means to the diffusers class that it names."""

import inspect
import json
import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.scheduler_config import (
    ABOVE_THE_CLEANEST,
    ALWAYS_LINSPACE,
    ON_THE_LIST,
    SAME_DEFAULTS,
)
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import SAMPLERS
from tests.pixel_models import pixel_model
from tests.tiny_pipeline import make_tiny_pipeline

TAKEN = (*ON_THE_LIST, *ABOVE_THE_CLEANEST)
ALL = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and not name.startswith(("Flax", "Consistency"))
)
OFFSET = {"steps_offset": 1, "skip_prk_steps": True}
"""StableDiffusionPipeline corrects every steps_offset to 1; PNDM has more steps with prk."""
CONFIGS = {
    "nothing": {},
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "v": {"prediction_type": "v_prediction", "beta_end": 0.01},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "short": {
        "num_train_timesteps": 300,
        "trained_betas": torch.linspace(1e-4, 0.03, 300).tolist(),
    },
    "zero_snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def visited(scheduler, num_steps):
    """The distinct timesteps of a diffusers scheduler, without those that a solver puts between."""
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.double()
    if type(scheduler).__name__.startswith(("KDPM2", "DPMSolverSDE")):
        timesteps = timesteps[::2]
    return timesteps.unique_consecutive()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", TAKEN)
def test_the_process_is_what_the_class_makes_of_the_config(name, config):
    if name in SAME_DEFAULTS:
        pytest.importorskip("torchsde")
    written = {"_class_name": name, **OFFSET, **config}
    theirs = getattr(diffusers, name).from_config(written)
    known = inspect.signature(type(theirs).__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        with pytest.raises(UserError, match=f"rescale_betas_zero_snr.*ignored by {name}"):
            Process.from_diffusers(written)
        return
    process = Process.from_diffusers(written)
    bar = process.schedule.alpha_bar
    last = -1 if process.schedule.is_zero_terminal_snr else None  # DPM++ has a stand-in for 0
    assert_close(bar[:last].float(), theirs.alphas_cumprod[:last], rtol=1e-4, atol=1e-6)
    assert process.prediction_type == theirs.config.prediction_type
    sampler = "dpmpp_2m" if name in ABOVE_THE_CLEANEST else "ddim"
    for num_steps in (2, 5, 7, 25, 50):
        ours = torch.tensor(process.timesteps(num_steps, sampler)).double()
        # Euler, LMS, Heun and KDPM2 ask between whole timesteps, on which no network was trained.
        assert_close(ours, visited(theirs, num_steps), rtol=0, atol=0.5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("name", "like"), SAME_DEFAULTS.items())
def test_a_class_that_needs_another_package_is_read_without_it(name, like, config):
    if config.get("rescale_betas_zero_snr"):
        with pytest.raises(UserError, match=f"rescale_betas_zero_snr.*ignored by {name}"):
            Process.from_diffusers({"_class_name": name, **config})
        return
    own, other = (Process.from_diffusers({"_class_name": kind, **config}) for kind in (name, like))
    assert own.to_diffusers() == other.to_diffusers()
    assert own.timesteps(7) == other.timesteps(7)


@pytest.mark.parametrize("name", TAKEN)
def test_a_written_process_is_read_as_it_was(name):
    for config in CONFIGS.values():
        try:
            process = Process.from_diffusers({"_class_name": name, **config})
        except UserError:
            continue
        again = Process.from_diffusers(process.to_diffusers())
        assert_close(again.schedule.alpha_bar, process.schedule.alpha_bar, rtol=1e-9, atol=1e-12)
        for sampler in SAMPLERS:
            assert again.timesteps(7, sampler) == process.timesteps(7, sampler)
        assert again.prediction_type == process.prediction_type
        assert again.set_alpha_to_one == process.set_alpha_to_one


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("name", ABOVE_THE_CLEANEST)
def test_only_a_multistep_sampler_leaves_the_cleanest_timestep_out(name, spacing):
    """The others walk the list that diffusers' DDIM, Euler and Heun make of such a config."""
    process = Process.from_diffusers({"_class_name": name, **OFFSET, "timestep_spacing": spacing})
    spacing = process.timestep_spacing  # singlestep DPM++ has linspace alone
    ddim = diffusers.DDIMScheduler(steps_offset=1, timestep_spacing=spacing)
    for num_steps in (2, 7, 25):
        ddim.set_timesteps(num_steps)
        for sampler in SAMPLERS:
            same = process.timesteps(num_steps, sampler) == ddim.timesteps.tolist()
            assert same == (sampler != "dpmpp_2m")


@pytest.mark.parametrize("name", TAKEN)
def test_equal_processes_are_written_alike_whatever_class_they_were_read_as(name):
    """So that digests of models with the same pictures are equal."""
    if name not in ALWAYS_LINSPACE:
        written = {"_class_name": name, "timestep_spacing": "trailing", "set_alpha_to_one": True}
        own, ddim = (written | {"_class_name": kind} for kind in (name, "DDIMScheduler"))
        betas = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
        processes = [Process.from_diffusers(config | betas) for config in (own, ddim)]
        assert processes[0].to_diffusers() == processes[1].to_diffusers()


@pytest.mark.parametrize("name", [name for name in ALL if name not in TAKEN])
def test_a_class_of_another_process_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"is of {name}, which is none of"):
        Process.from_diffusers({"_class_name": name, "num_train_timesteps": 1000})


def test_classes_that_make_another_process_of_a_key_are_refused_by_it():
    for name, key, value in (
        ("UniPCMultistepScheduler", "use_flow_sigmas", True),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "prediction_type", "flow_prediction"),
    ):
        with pytest.raises(UserError, match=f"{key}="):
            Process.from_diffusers({"_class_name": name, key: value})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"beta_end": "0.0120"}, "beta_end='0.0120'.*must be a number"),
        ({"beta_start": [0.00085]}, "beta_start="),
        ({"beta_start": None}, "beta_start=None"),
        ({"beta_start": -0.1}, "beta_start=-0.1"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"beta_end": 10**400}, "beta_end=1000"),
        ({"num_train_timesteps": 10**400}, "num_train_timesteps=1000"),
        ({"trained_betas": [10**400] * 1000}, "trained_betas=.*list of numbers"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps=1000.5"),
        ({"num_train_timesteps": float("inf")}, "num_train_timesteps=inf"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps="),
        ({"trained_betas": "linear"}, "trained_betas='linear'"),
        ({"trained_betas": [0.1, "0.2"]}, "trained_betas=.*list of numbers"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas=.*num_train_timesteps=1000"),
        ({"steps_offset": "1"}, "steps_offset='1'"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr='false'"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one=1"),
        ({"beta_schedule": ["linear"]}, "beta_schedule="),
        ({"prediction_type": ["epsilon"]}, "prediction_type="),
        ({"timestep_spacing": None}, "timestep_spacing=None"),
        ({"_class_name": ["DDIMScheduler"]}, "is of"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(entries, message):
    with pytest.raises(UserError, match=message):
        Process.from_diffusers({"_class_name": "DDIMScheduler", **entries})


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(
    "entries",
    [{"steps_offset": None}, {"num_train_timesteps": 1000.0}, {"use_karras_sigmas": None}],
)
def test_another_way_to_write_a_default_is_read_as_it(name, entries, caplog):
    absent = {"_class_name": name, "timestep_spacing": "linspace", "final_sigmas_type": "zero"}
    expected = Process.from_diffusers(absent)
    caplog.clear()
    process = Process.from_diffusers(absent | entries)
    assert not caplog.records
    written, wanted = (sorted(one.to_diffusers().items()) for one in (process, expected))
    assert repr(written) == repr(wanted)  # 1000, not 1000.0: digests are of this
    assert process.timesteps(7) == expected.timesteps(7)
    assert process.scheme.get("num_train_timesteps", 1000) == 1000


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2000),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.floats(0, 1), max_size=3),
    st.sampled_from(["linspace", "trailing", "epsilon", "v_prediction", "linear", "0.0120"]),
)
KEYS = st.sampled_from(
    ["beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas"]
    + ["prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "_class_name"]
    + ["rescale_betas_zero_snr", "use_karras_sigmas", "final_sigmas_type", "lambda_min_clipped"]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(TAKEN), st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_config_is_read_or_refused(name, entries):
    try:
        process = Process.from_diffusers({"_class_name": name, **entries})
    except UserError:
        return
    process.timesteps(2)


def test_what_a_class_takes_without_being_told_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        Process.from_diffusers({"_class_name": "DDIMScheduler"})
        assert not caplog.records
        Process.from_diffusers({"_class_name": "EulerDiscreteScheduler"})
        [record] = caplog.records
        assert "EulerDiscreteScheduler, which takes timestep_spacing=linspace" in record.message
        caplog.clear()
        Process.from_diffusers(
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "timestep_spacing": "linspace",
                "use_karras_sigmas": True,
            }
        )
        assert "use_karras_sigmas=True in the scheduler config is not kept" in caplog.text


@pytest.mark.parametrize("spacing", [None, "leading", "linspace"])
def test_a_folder_with_dpmpp_samples_as_the_pipeline_of_that_folder(tmp_path, spacing):
    entries = {"_class_name": "DPMSolverMultistepScheduler", "set_alpha_to_one": None}
    folder = make_tiny_pipeline(
        tmp_path / "sd", scheduler={**entries, **({"timestep_spacing": spacing} if spacing else {})}
    )
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"set_alpha_to_one": null,', ""))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a one",
        num_inference_steps=7,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    ours = DiffusionModel.load(folder).sample(
        "a one", [3], num_steps=7, guidance_scale=3.0, guidance_rescale=0.0, sampler="dpmpp_2m"
    )
    assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_class_is_that_of_model_index_as_in_diffusers(tmp_path):
    folder = make_tiny_pipeline(tmp_path / "sd", scheduler={"_class_name": "DDIMScheduler"})
    config = folder / "scheduler" / "scheduler_config.json"
    index = json.loads((folder / "model_index.json").read_text())
    for entry, written in (
        (["diffusers", "EulerDiscreteScheduler"], {"_class_name": "DDIMScheduler"}),
        (["diffusers", "EulerDiscreteScheduler"], {}),
        (["diffusers", "DDIMScheduler"], {"_class_name": "EulerDiscreteScheduler"}),
    ):
        config.write_text(json.dumps(written))
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
        theirs = StableDiffusionPipeline.from_pretrained(folder).scheduler
        assert type(theirs).__name__ == entry[1]
        process = DiffusionModel.load(folder, with_unet=False).process
        assert process.timestep_spacing == theirs.config.timestep_spacing


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "PNDMScheduler"])
def test_the_advice_on_a_class_is_enough_to_load_the_folder(tmp_path, name):
    """Naming DDIMScheduler in both files."""
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    folder = make_tiny_pipeline(tmp_path / "sd", scheduler={"_class_name": name, **zero_snr})
    message = "as scheduler in model_index.json and as _class_name in scheduler_config.json"
    with pytest.raises(UserError, match=message):
        DiffusionModel.load(folder, with_unet=False)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        path = folder / file
        path.write_text(path.read_text().replace(name, "DDIMScheduler"))
    process = DiffusionModel.load(folder, with_unet=False).process
    assert process.schedule.is_zero_terminal_snr


@pytest.mark.parametrize("condition", ["class", "text", "none"])
def test_both_files_of_a_saved_pixel_model_name_one_class(tmp_path, condition):
    model = pixel_model(condition, make_tiny_pipeline(tmp_path / "sd"))
    leading = replace(model.process, timestep_spacing="leading", omits_cleanest=True)
    for process in (model.process, leading):
        model.process = process
        model.save(tmp_path / "pixels")
        config = json.loads((tmp_path / "pixels/scheduler/scheduler_config.json").read_text())
        index = json.loads((tmp_path / "pixels/model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", config["_class_name"]]
        assert DiffusionModel.load(tmp_path / "pixels").process.timesteps(5) == process.timesteps(5)


def test_a_class_of_model_index_is_refused_by_name(tmp_path):
    folder = make_tiny_pipeline(tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = "FlowMatchEulerDiscreteScheduler"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is of FlowMatchEulerDiscreteScheduler"):
        DiffusionModel.load(folder, with_unet=False)
